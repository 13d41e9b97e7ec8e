"""Whether a model is fed what drafts are verified with: its own `prepare_inputs_for_generation` is asked.

Plain decoding lets the model prepare every pass's input, and a model class (or PEFT, for virtual tokens) may change
there what a step is fed. Verification feeds ids, positions and masks as transformers' own method prepares them. So
where a model has another method, both are called for every token of the text as in plain decoding, and what differs is
told in one error instead of other tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.utils.generic import ModelOutput

from zerodraft.common.errors import ZerodraftError

PREPARE, UPDATE = "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"
LOOP = ("_sample", "_prefill")
"""What plain decoding itself is made of."""
SETTLED = ("use_cache", "logits_to_keep", "synced_gpus")
"""Arguments that verification sets by itself."""


def feeding(model: Any, arguments: Mapping[str, Any]) -> "Feeding | None":
    """What compares the model's own preparation with transformers', or None where they are one.

    Args:
        model: What `generate` was called on.
        arguments: The model's arguments of the first pass, as `generate` hands them on.

    Raises:
        ZerodraftError: a model with a decoding loop of its own.
    """
    for name in LOOP:
        if hasattr(GenerationMixin, name) and not _is_inherited(model, name):
            raise ZerodraftError(
                f"{type(model).__name__} has its own way of decoding ({name}), which drafts cannot follow; leave "
                "out custom_generate."
            )
    return None if _is_inherited(model, PREPARE) and _is_inherited(model, UPDATE) else Feeding(model, arguments)


class _LengthAlone(DynamicCache):
    """A cache as long as that of plain decoding, whatever drafts have put into the real one."""

    length = 0

    def __bool__(self) -> bool:
        return self.length > 0 or bool(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class Feeding:
    """Compares for each token of a text what the model's methods and transformers' own make of a pass's arguments."""

    def __init__(self, model: Any, arguments: Mapping[str, Any]) -> None:
        self.model = model
        self._arguments = dict(arguments)
        self._cache = _LengthAlone()
        self._held = 0
        for name, value in arguments.items():
            if isinstance(value, Cache):
                self._held = int(value.get_seq_length())
                self._cache.layers = list(value.layers)
                self._arguments[name] = self._cache
        self._is_first = True

    def __call__(self, ids: Int[Tensor, "B T"]) -> None:
        """Compare for the token after these, once.

        Raises:
            ZerodraftError: what the model is fed is not what drafts are verified with.
        """
        if not self._is_first and ids.shape[1] == self._held:
            return
        self._cache.length = self._held
        arguments = {
            "next_sequence_length": ids.shape[1] - self._held,
            "is_first_iteration": self._is_first,
            **self._arguments,
        }
        self._same(PREPARE, lambda owner: owner(ids, **arguments))
        self._arguments = self._same(UPDATE, lambda owner: owner(ModelOutput(), dict(self._arguments)))
        self._held, self._is_first = ids.shape[1], False

    def _same(self, name: str, call: Callable[[Callable[..., Any]], dict[str, Any]]) -> dict[str, Any]:
        """What transformers' own method returns, if the model's returns the same."""
        method = getattr(self.model, name)
        usual = call(getattr(GenerationMixin, name).__get__(self.model))
        try:
            own = call(method)
        except Exception as error:
            raise ZerodraftError(
                f"{_name(method)} fails where drafts are verified ({error!r}); leave out custom_generate."
            ) from error
        changed = sorted(key for key in {*own, *usual} - {*SETTLED} if not _is_same(own.get(key), usual.get(key)))
        if changed:
            raise ZerodraftError(
                f"{_name(method)} changes what a decoding step is fed ({', '.join(changed)}), and drafts are verified "
                "without that; leave out custom_generate. (Of PEFT's adapters, those with virtual tokens do so; LoRA "
                "does not.)"
            )
        return usual


def _is_inherited(model: Any, name: str) -> bool:
    return getattr(getattr(model, name), "__func__", None) is getattr(GenerationMixin, name)


def _name(method: Any) -> str:
    return getattr(method, "__qualname__", type(method).__name__)


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor) or isinstance(a, Cache):
        return a is b
    return bool(a == b)
