"""Any causal language model of transformers as a target, unchanged: forward passes with trees for drafts.

A tree is scored in one pass: each node has the position of its depth and a mask that shows it the cached text and its
own ancestors (SpecInfer, arXiv 2305.09781). Masks are made here in the form that the model's attention takes, one for
each kind of layer; where a layer has a sliding window, they apply it, as the cache (`cache.py`) holds the whole text.

Legend: B rows, T tokens of this pass, S columns of the cache.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.protocols import Target, TargetOutput
from zerodraft.fast.cache import DraftCache, check_readable, drops_windows
from zerodraft.models.caches import argument_of, check_takes_cache
from zerodraft.ztt.interface import current

FULL, SLIDING = "full_attention", "sliding_attention"


class HfTarget:
    """A `Target` over a transformers causal language model.

    Args:
        model: The model; neither it nor its configuration is changed.
        capacity: Tokens to have room for from the start (a static cache).
        inputs: More arguments for each forward pass.
        past: The cache of plain decoding. Where it holds the beginning of every row's text, the first prompt has to
            have more than that. It is only read.

    Raises:
        ZerodraftError: a model that cannot score a tree, or a `past` that cannot be read.
    """

    def __init__(
        self,
        model: Any,
        *,
        capacity: int = 0,
        inputs: Mapping[str, Any] | None = None,
        past: Cache | None = None,
    ) -> None:
        self.model = model
        self.device: torch.device = model.device if model.device.type != "meta" else torch.device("cpu")
        self.cache = DraftCache(capacity)
        self._past = past if past is not None and past.get_seq_length() else None
        if past is not None:
            check_readable(past)
        self._drops = drops_windows(past)
        self._is_static = past is not None and any(isinstance(layer, StaticLayer) for layer in past.layers)
        self._inputs = dict(inputs or {})
        self._config = model.config.get_text_config(decoder=True)
        self._kinds, self._window = attention_kinds(self._config)
        self._by_kind = getattr(self._config, "layer_types", None) is not None
        self._additive = takes_additive_mask(self._config)
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in parameters:
            raise ZerodraftError(
                f"{type(model).__name__} takes no position_ids (ALiBi or recurrent?), so a draft tree cannot be "
                "placed; choose a model with rotary or learned positions."
            )
        check_takes_cache(model)
        self._cache_argument = argument_of(model)
        if getattr(self._config, "alibi", False):
            raise ZerodraftError(
                f"{type(model).__name__} makes its ALiBi biases from a two-dimensional mask (alibi=True), which cannot "
                "show a draft tree; choose a model with rotary or learned positions."
            )
        self._keeps_logits = "logits_to_keep" in parameters
        # Which columns are text; beyond the cache's end of a row they are false.
        self._text = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
        self._padded = False
        self._positions: list[int] = []

    def prefill(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], taps: Sequence[int]) -> TargetOutput:
        """See `Target.prefill`."""
        if self._past is not None:
            return self._resume(ids, mask, taps)
        rows, columns = ids.shape
        known = self._text[:, : self.cache.extent.start] if self.cache.extent.start else mask[:, :0]
        text = torch.cat([known, mask], 1)
        self._padded = not bool(text.all())
        positions = (text.cumsum(1) - 1).clamp_min(0)[:, -columns:]
        out = self._forward(ids, text.long() if self._padded else None, positions, taps, last_only=True)
        self._look_at_windows(text.shape[1])
        self.cache.append(rows, columns)
        self._text = text
        self._positions = text.sum(1).tolist()
        return TargetOutput(out.logits[:, -1:], self._taps(out, taps))

    def score(
        self, ids: Int[Tensor, "B T"], depth: Int[Tensor, "B T"], visible: Bool[Tensor, "B T T"], taps: Sequence[int]
    ) -> TargetOutput:
        """See `Target.score`."""
        positions = depth + torch.tensor(self._positions, device=depth.device)[:, None]
        out = self._forward(ids, self.masks(depth, visible), positions, taps)
        return TargetOutput(out.logits, self._taps(out, taps))

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """See `Target.keep`."""
        before = self.cache.lengths
        exits = current.generation
        if exits is not None and exits.model is self.model and len(kept) == 1:
            exits.keep(self.cache.extent.start, kept[0])
        self.cache.keep(kept)
        self._positions = [position + len(nodes) for position, nodes in zip(self._positions, kept, strict=True)]
        if self._padded or len(kept) > 1:
            missing = self.cache.extent.start - self._text.shape[1]
            if missing > 0:
                # some room more, so that not every step allocates
                self._text = torch.nn.functional.pad(self._text, (0, missing + 64))
            for row, (start, end) in enumerate(zip(before, self.cache.lengths, strict=True)):
                self._text[row, start:end] = True

    def crop(self, lengths: Sequence[int]) -> None:
        """See `LastingTarget.crop`; for a single row without padding."""
        (length,) = lengths
        self.cache.extent.start, self.cache.lengths = length, [length]
        self._positions = [length]
        self._text = torch.ones(1, length, dtype=torch.bool, device=self.device)

    @property
    def nbytes(self) -> int:
        """See `LastingTarget.nbytes`."""
        return sum(
            states.nbytes for layer in self.cache.written for states in (layer.keys, layer.values) if states is not None
        )

    def goes_on_from(self, earlier: Target) -> bool:
        """See `LastingTarget.goes_on_from`."""
        return (
            isinstance(earlier, type(self))
            and self.model is earlier.model
            and self._additive == earlier._additive
            # else what a window hides depends on how the text was read
            and (SLIDING not in earlier._kinds or True in earlier.cache.asked)
        )

    def masks(self, depth: Int[Tensor, "B T"], visible: Bool[Tensor, "B T T"]) -> Any:
        """What the model takes as its attention mask: of shape (B, 1, T, S + T), or one such for each kind of layer."""
        start, lengths = self.cache.extent.start, self.cache.lengths
        rows, count = depth.shape
        full = torch.ones(rows, 1, count, start + count, dtype=torch.bool, device=depth.device)
        full[:, 0, :, start:] = visible
        if self._padded or rows > 1:
            full[:, 0, :, :start] = self._text[:, None, :start]
        made = {FULL: full}
        if SLIDING in self._kinds:
            own = depth + torch.tensor(lengths, device=depth.device)[:, None]
            column = torch.arange(start, device=depth.device).expand(rows, start)
            distance = own[:, :, None] - torch.cat([column, own], 1)[:, None]
            made[SLIDING] = full & (distance < self._window)[:, None]
        if self._additive:
            lowest = torch.finfo(self.model.dtype).min
            made = {
                kind: torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(~mask, lowest)
                for kind, mask in made.items()
            }
        if not self._by_kind:
            return made[self._kinds[0]]
        return {kind: made[kind] for kind in self._kinds}

    def export(self, cache: Cache, columns: int | None = None) -> None:
        """Hand the text's keys and values, or those of its first columns, to a caller's cache: an empty one, or the one
        that decoding began with."""
        self.cache.copy_to(cache, columns)

    def _look_at_windows(self, columns: int) -> None:
        """Take the windows from what the model has asked for, where its configuration says more than its layers do;
        prompts have so many columns by now.

        Raises:
            ZerodraftError: tokens that plain decoding's cache drops for layers that look at all.
        """
        asked = self.cache.asked
        if SLIDING not in self._kinds or True in asked:
            return
        in_pieces = self._is_static or self.cache.extent.start > 0
        differs = in_pieces and columns > self._window
        if not asked and (not self._drops or differs):
            raise ZerodraftError(
                f"{type(self.model).__name__} makes its own attention masks, so it is unknown whether its "
                f"layers have the sliding_window={self._window} of its configuration; leave the options of the cache "
                "and prefill_chunk_size away, or take sliding_window out of the configuration."
            )
        if not asked:
            return
        if self._drops and (len(self._kinds) > 1 or differs):
            raise ZerodraftError(
                f"{type(self.model).__name__} has no sliding windows, but its configuration says "
                f"sliding_window={self._window}, and so plain decoding's cache drops tokens; give "
                f"{self._cache_argument}=DynamicCache(), or take sliding_window out of the configuration."
            )
        # a dynamic cache drops nothing of a prompt that is read at once, and then all but the window for each token
        self._kinds, self._by_kind = [SLIDING if self._drops else FULL], False

    def _resume(self, ids: Tensor, mask: Tensor, taps: Sequence[int]) -> TargetOutput:
        """Take the beginning of the prompts from the caller's cache and read the rest."""
        past, self._past = self._past, None
        assert past is not None
        self.cache.copy_from(past, len(ids))
        held = self.cache.extent.start
        self._text = mask[:, :held]
        out = self.prefill(ids[:, held:], mask[:, held:], taps)
        if not taps:
            return out
        # A cache keeps no hidden states. They decide about drafts alone, so they may come from another pass.
        text = self._text[:, :held]
        positions = (text.cumsum(1) - 1).clamp_min(0)
        before = self._forward(ids[:, :held], text.long(), positions, taps, last_only=True, cached=False)
        known = [states for states in (self._taps(before, taps), out.taps) if states is not None]
        return TargetOutput(out.logits, torch.cat(known, 1))

    def _forward(
        self,
        ids: Tensor,
        mask: Any,
        positions: Tensor,
        taps: Sequence[int],
        *,
        last_only: bool = False,
        cached: bool = True,
    ) -> Any:
        more = {"logits_to_keep": 1} if last_only and self._keeps_logits else {}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cached,
            output_hidden_states=bool(taps),
            return_dict=True,
            **{self._cache_argument: self.cache if cached else None},
            **more,
            **self._inputs,
        )

    def _taps(self, out: Any, taps: Sequence[int]) -> Tensor | None:
        if not taps:
            return None
        states = [out.hidden_states[i].to(self.device) for i in taps]
        if any(of_layer.ndim != 3 for of_layer in states):
            raise ZerodraftError(
                f"{type(self.model).__name__} has hidden states of shape {tuple(states[0].shape)} where the drafter "
                "looks for (batch, tokens, size); choose a drafter that needs none, such as PromptLookupDrafter."
            )
        return torch.stack(states, 2)


def attention_kinds(config: Any) -> tuple[list[str], int]:
    """The kinds of attention that a text model's layers have, and their sliding window (0: none).

    Raises:
        ZerodraftError: a kind for which a draft tree cannot be masked.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = [SLIDING if sliding else "chunked_attention" if chunked else FULL]
    found = sorted(set(kinds))
    for kind in found:
        if kind not in (FULL, SLIDING):
            raise ZerodraftError(
                f"The target ({config.model_type!r}) has layers of kind {kind!r}, whose state cannot drop rejected "
                f"tokens; only {FULL!r} and {SLIDING!r} can be verified."
            )
    return found, int(config.sliding_window) if SLIDING in found else 0


def takes_additive_mask(config: Any) -> bool:
    """Whether masks are added to the scores (eager attention) rather than boolean (torch's fused attention).

    Raises:
        ZerodraftError: an attention implementation that takes no mask of a tree.
    """
    name = config._attn_implementation or "eager"
    made_by = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if made_by not in (eager_mask, sdpa_mask):
        raise ZerodraftError(
            f"attn_implementation={name!r} takes no mask of a draft tree; load the target with "
            "attn_implementation='sdpa' (or 'eager')."
        )
    return made_by is eager_mask
