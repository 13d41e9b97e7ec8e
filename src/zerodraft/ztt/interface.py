"""How zero tokens reach the attention of a transformers layer: through its AttentionInterface, nothing patched.

A layer hands its `**kwargs` down to the attention function that its configuration names. Ours are registered as
`zero_token_<backend>`, find a `LayerCall` among the kwargs, fold its key into the attention, and leave the mass there.
The call also carries the `TokenGrid` of a compacted step: the layer then sees only the tokens that still run, in one
row, and the attention puts their queries back in their places in the batch.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt import attention as zero

PREFIX = "zero_token_"
BACKENDS = ("sdpa", "eager", "flex_attention")


class Once:
    """What all layers of a forward pass share and would each make again: made for the first that asks."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any]] = []

    def __call__(self, value: Any, make: Callable[[Any], Any]) -> Any:
        """`make(value)`; every value has one maker."""
        for known, made in self._made:
            if known is value:
                return made
        self._made.append((value, make(value)))
        return self._made[-1][1]


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Places of the running tokens in the `(batch, time)` grid of a forward pass.

    Attributes:
        index: `(n,)`, `row * time + column` of each running token.
        packed: What `pack_once` has packed.
    """

    index: Int[Tensor, " n"]
    batch: int
    time: int
    packed: Once = field(default_factory=Once, repr=False)

    def pack(self, x: Tensor) -> Tensor:
        """`(batch or 1, time, ...)` -> `(1, n, ...)`: the running tokens in one row."""
        x = x.expand(self.batch, self.time, *x.shape[2:])
        return x.reshape(self.batch * self.time, *x.shape[2:])[self.index][None]

    def pack_once(self, value: Tensor | tuple[Tensor, ...]) -> Any:
        """`pack` of arguments that all layers share (rotary embeddings, positions), done for the first of them."""
        return self.packed(value, lambda x: self.pack(x) if isinstance(x, Tensor) else tuple(map(self.pack, x)))

    def unpack(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """`(1, n, ...)` -> `(batch, time, ...)`; the other places keep `into`, or are zero."""
        shape = (self.batch * self.time, *x.shape[2:])
        base = x.new_zeros(shape) if into is None else into.reshape(shape)
        return base.index_copy(0, self.index, x[0]).view(self.batch, self.time, *x.shape[2:])


class LayerCall:
    """One execution of a stored layer: what its attention needs to know, and what it found.

    No dataclass: FSDP copies dataclasses on their way into a layer, and what was found would be lost with the copy.

    Attributes:
        cycle: Cycle of the execution, 0-based.
        key: `(kv, d)`, or `(b, kv, t, d)` with one key per query, or None for plain attention.
        grid: Where the tokens of a compacted step belong, or None if the step has the whole batch.
        need_mass: Whether somebody will read `mass`.
        masks: The masks of the forward pass as the attention takes them.
        mass: Filled in: `(b, t, h)`, or `(1, n, h)` of a compacted step.
        attended: Filled in: whether the call reached our attention function.
    """

    def __init__(
        self,
        cycle: int = 0,
        key: Tensor | None = None,
        grid: TokenGrid | None = None,
        need_mass: bool = True,
        masks: Once | None = None,
    ) -> None:
        self.cycle, self.key, self.grid, self.need_mass = cycle, key, grid, need_mass
        self.masks = Once() if masks is None else masks
        self.mass: Float[Tensor, "b t h"] | None = None
        self.attended = False


class Current(threading.local):
    """What is under way in this thread, for those parts of a model that no argument of ours reaches.

    No ContextVar: `torch.compile` loses what is set in one, and cannot trace a whole graph through it.

    Attributes:
        call: The call whose attention module ran last; the FFN gate and the per-cycle LoRA read it.
        run: The forward pass, which the walk over the layers goes to.
        generation: The `generate` call with early exit: its options must not travel through kwargs that an assistant
            model also gets.
    """

    def __init__(self) -> None:
        # in every thread's own dictionary from the start: torch.compile guards on what is in it
        self.call: LayerCall | None = None
        self.run: Any = None
        self.generation: Any = None


current = Current()


@contextmanager
def without_exits() -> Iterator[None]:
    """Forward passes within this context run all cycles, whatever the `generate` under way was asked for, and it hears
    nothing of them."""
    outer, current.generation = current.generation, None
    try:
        yield
    finally:
        current.generation = outer


def announce_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of an attention module. It also runs when gradient checkpointing recomputes a layer."""
    current.call = kwargs.get("layer_call")


def _attend(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layer_call: LayerCall | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that layers call: `(b, h, t, d)` in, `(b, t, h, d)` and eager's weights out.

    The weights are those of the real tokens; a row lacks to 1 what lies on the zero token.
    """
    call = layer_call or LayerCall()
    call.attended = True
    if call.grid is not None:
        query = call.grid.unpack(query.transpose(1, 2)).transpose(1, 2)
    if torch.is_autocast_enabled(query.device.type):
        # Autocast brings torch's attention to one dtype (rotated q and k are float32, v is not), but not its kernels,
        # and nothing under vmap.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if call.key is None:
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(backend, _family_eager(module))
        out, weights = plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    else:
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise ZerodraftError(
                f"{type(module).__name__} caps its attention scores or has attention sinks, which zero tokens do not "
                "support; set zero_tokens=False for this family."
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = getattr(module, "is_causal", True) and attention_mask is None and query.shape[2] > 1
        if causal and key.shape[2] > query.shape[2]:
            # An empty static cache: only the first keys are written, and the square mask is the whole mask.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if (key.shape[1], key.shape[3]) != (call.key.shape[-2 if call.key.ndim == 2 else 1], call.key.shape[-1]):
            raise ZerodraftError(
                f"{type(module).__name__} attends to {key.shape[1]} keys of size {key.shape[3]} a token, which is not "
                "what its configuration says; set zero_tokens=False for this family."
            )
        out, mass, weights = _zero_attention(backend, call, query, key, value, attention_mask, causal, scale, dropout)
        out, call.mass = out.transpose(1, 2), None if mass is None else mass.transpose(1, 2)
    if call.grid is not None:
        out = call.grid.pack(out)
        call.mass = None if call.mass is None else call.grid.pack(call.mass)
    return out.contiguous(), weights


def _zero_attention(
    backend: str,
    call: LayerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    causal: bool,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, mass, and weights if eager, in the fastest form that backend, device and inputs allow; all are equal. The
    other forms go without the weights of all keys, where there is a way around them."""
    assert call.key is not None
    if backend == "eager":
        s0 = zero.zero_scores(q, call.key, scale)
        weights, mass = zero.zero_attention_weights(q, k, s0, mask=mask, is_causal=causal, scale=scale)
        return zero.weighted_values(weights, v, dropout), mass, weights
    if q.shape[-1] != v.shape[-1]:
        # Latent attention: kernels want one size for keys and values. Zeros change no score, and come out as zeros.
        width = max(q.shape[-1], v.shape[-1])
        padded = LayerCall(call.cycle, F.pad(call.key, (0, width - q.shape[-1])), None, call.need_mass, call.masks)
        q, k, wide = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out, mass, _ = _zero_attention(backend, padded, q, k, wide, mask, causal, scale, dropout)
        return out[..., : v.shape[-1]], mass, None
    if backend == "flex_attention":
        s0 = zero.zero_scores(q, call.key, scale)
        return *zero.zero_attention_flex(q, k, v, s0, block_mask=mask, scale=scale), None
    # within torch.func's transforms no tensor says whether it needs a gradient, and the LSE forms have none there
    transformed = torch._C._are_functorch_transforms_active()
    if q.device.type == "cpu" and backend == "sdpa" and dropout == 0 and not transformed:
        if mask is not None:
            mask = call.masks(mask, lambda x: zero.AdditiveMask.of(x, q))
        return *zero.zero_attention_lse(
            q, k, v, call.key, mask=mask, is_causal=causal, scale=scale, need_mass=call.need_mass
        ), None
    forms = {"mask": mask, "is_causal": causal, "scale": scale}
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, call.key))
    if not transformed and zero.has_lse_kernel(q, k, mask, causal, dropout, needs_grad):
        return *zero.zero_attention_lse(q, k, v, call.key, need_mass=call.need_mass, **forms), None
    if call.key.ndim == 2 and not (dropout > 0 and call.need_mass):  # dropout there would fall on the mass, too
        return *zero.zero_attention_sdpa(q, k, v, call.key, dropout=dropout, need_mass=call.need_mass, **forms), None
    s0 = zero.zero_scores(q, call.key, scale)
    return *zero.zero_attention_reference(q, k, v, s0, dropout=dropout, **forms), None


def _family_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention function of the family that an attention module belongs to."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _sdpa_mask(make: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA; none where a compiled pass is causal and nothing more.

    While it is compiled, transformers writes every mask out, as it may not look for padding or packed texts in values;
    and no flash kernel takes one.
    """
    if torch.compiler.is_compiling() and current.run is not None and current.run.causal_only:
        square = kwargs.get("q_length", -1) == kwargs.get("kv_length", -2)
        if square and kwargs.get("local_size") is None and not kwargs.get("use_vmap", True):
            return None
    return make(*args, **kwargs)


def _register(backend: str) -> None:
    def attend(*args, **kwargs):
        return _attend(backend, *args, **kwargs)

    AttentionInterface.register(PREFIX + backend, attend)
    make = ALL_MASK_ATTENTION_FUNCTIONS[backend]
    AttentionMaskInterface.register(PREFIX + backend, partial(_sdpa_mask, make) if backend == "sdpa" else make)


for _backend in BACKENDS:
    _register(_backend)


def attention_name(backend: str | None) -> str:
    """The registered name of our attention for one of transformers' implementations.

    Raises:
        ZerodraftError: zero tokens have no form for it.
    """
    backend = backend or "sdpa"
    if backend not in BACKENDS:
        raise ZerodraftError(f"attn_implementation={backend!r} is not supported; choose one of {', '.join(BACKENDS)}.")
    return PREFIX + backend
