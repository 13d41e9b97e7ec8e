"""The lean decode path as a target: a model's packed weights run over one key-value buffer that is allocated ahead.

Packed weights, queries, keys and values from one product, activations and sums inside the products. Where kernels can
be compiled, a pass's layers are one call (`compiled_layers`), else they are torch's (`torch_layers`). Same results as
the model's own forward up to rounding; the model is only read.

Legend: B rows of the batch, T tokens of one call, N = B*T, H hidden size.
"""

import weakref
from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from zerodraft.decoding.protocols import Target, TargetOutput
from zerodraft.fast.check import scores_as_model
from zerodraft.fast.compiled import CPU
from zerodraft.fast.lean.cache import LeanCache
from zerodraft.fast.lean.draft import OwnDraft
from zerodraft.fast.lean.exits import Depths, EarlyExit
from zerodraft.fast.lean.passes import Tokens
from zerodraft.fast.lean.weights import LeanWeights, lean_weights, release_lean
from zerodraft.ztt.exits import AtLeast, ExitRule, FixedExit
from zerodraft.ztt.interface import current, without_exits
from zerodraft.ztt.pretrained import ExitRecord


def lean_target(model: nn.Module) -> "LeanTarget | None":
    """A fresh target over the model's packed weights, or None for a model that this path cannot compute exactly:
    another family, dtype or device, quantised layers, adapters, hooks, frequencies that depend on the length, dropout;
    of Zero Token Transformers those with per-cycle LoRA. Within a `generate` that was given an exit rule the target of
    the model that generates follows it.

    The first call packs the weights (a second copy of them in memory) and compares them with the model's own forward
    pass on a few tokens; they are kept for later calls until the model changes, is gone, or `release` is called. Where
    the two differ, a warning says so, and the answer is None.
    """
    weights, exits = packed_weights(model), current.generation
    if exits is not None and exits.model is not model:
        exits = None
    if weights is None or (exits is not None and weights.stages is None):
        return None
    return LeanTarget(weights, model, exits)


def packed_weights(model: nn.Module) -> LeanWeights | None:
    """The packed weights of a model that this path computes exactly, else None: see `lean_target`."""
    return lean_weights(model, _accept)


def _accept(model: nn.Module, weights: LeanWeights) -> bool:
    windows = [layer.window for layer in weights.layers if layer.window is not None]
    with without_exits():
        return scores_as_model(model, LeanTarget(weights, model), min(windows, default=None))


class LeanTarget:
    """`zerodraft.decoding.protocols.Target` over packed weights; `exits` says how its tokens leave their cycles
    early, and learns after how many."""

    def __init__(self, weights: LeanWeights, model: nn.Module, exits: ExitRecord | None = None) -> None:
        self.device = CPU
        self._model = weakref.ref(model)
        self._weights = weights
        self._cache = LeanCache(weights)
        self._exits, self._depths = exits, Depths()
        self._early = None if exits is None else EarlyExit(weights, exits.rule, exits.policy)
        self._draft: OwnDraft | None = None
        self._drafting: tuple[int, ExitRule | None, EarlyExit] | None = None
        # where the last call's tokens lie, if not in order
        self._places: list[int] | None = None

    def release(self) -> None:
        """Give back the memory of the cache and of the model's packed weights. The target is of no use afterwards."""
        if (model := self._model()) is not None:
            release_lean(model)
        self._draft = self._drafting = self._early = None
        del self._weights, self._cache

    @torch.no_grad()
    def prefill(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], taps: Sequence[int]) -> TargetOutput:
        """Cache prompts and score what follows them; see the protocol."""
        self._draft = self._places = None
        batch, count = ids.shape
        cache = self._cache
        cache.make_room(batch, count)
        whole = bool(mask.all())
        gaps = None if whole else cache.new_gaps(mask)
        if whole and batch == 1:
            depth, visible = torch.arange(count, device=CPU)[None], None
        else:
            # padding sees itself, so that its scores stay finite; nobody else sees it
            depth = (mask.cumsum(-1) - 1).clamp_(min=0)
            visible = (torch.ones(count, count, dtype=torch.bool, device=CPU).tril() & mask[:, None, :]).logical_or_(
                torch.eye(count, dtype=torch.bool, device=CPU)
            )
        tokens = cache.tokens(depth, visible, gaps=gaps)
        output = self._forward(ids, tokens, taps, last_only=True, real=None if whole else mask)
        kept = cache.keep_prompts(mask, gaps)
        self._note(kept)
        return output

    @torch.no_grad()
    def score(
        self,
        ids: Int[Tensor, "B T"],
        depth: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T T"],
        taps: Sequence[int],
    ) -> TargetOutput:
        """Score more tokens after what is cached; see the protocol."""
        draft, self._draft, self._places = self._draft, None, None
        self._cache.make_room(*ids.shape)
        if draft is not None and draft.ids and len(ids) == 1 and not taps and self._exits is None:
            with torch.inference_mode():
                x, self._places = draft.verify(ids, depth, visible)
            return TargetOutput(logits=self._weights.logits(x)[None], taps=None)
        return self._forward(ids, self._cache.tokens(depth, visible), taps, last_only=False)

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these of the last call's tokens, one rising list of indices a row; see the protocol."""
        if self._places is not None:
            kept = [[self._places[node] for node in nodes] for nodes in kept]
        self._cache.keep(kept)
        self._note(kept)

    @property
    def nbytes(self) -> int:
        """See `LastingTarget.nbytes`."""
        return self._cache.nbytes

    def drafts_for(self, model: nn.Module) -> bool:
        """Whether this is a model's target, and its cycles can draft."""
        return self._model() is model and self._weights.stages is not None

    def begin_draft(self, cycles: int, rule: ExitRule | None = None) -> None:
        """What `draft` is given from now on are the last known tokens and what is drafted behind them, by the first
        cycles; with a rule by these and those that it lets a token run. The next `score` goes on from there."""
        known = self._drafting
        if known is None or known[0] != cycles or known[1] is not rule:
            # without a rule nobody sees what a drafted token leaves in later cycles, so it leaves what costs nothing
            early = (
                EarlyExit(self._weights, FixedExit(cycles=cycles), "latest")
                if rule is None
                else EarlyExit(self._weights, AtLeast(cycles, rule), "propagate")
            )
            known = self._drafting = cycles, rule, early
        self._draft = OwnDraft(weights=self._weights, cache=self._cache, cycles=cycles, early=known[2])

    @torch.no_grad()
    def draft(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Scores of what follows one more token of each text, as the first cycles have it."""
        assert self._draft is not None
        with torch.inference_mode():
            x = self._draft.step(ids)
        return self._weights.logits(x)

    @torch.inference_mode()
    def draft_likeliest(
        self, first: int, length: int, *, candidates: int, least: float, eos: Collection[int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Candidates of up to `length` tokens behind the last known one and their log-probabilities, (k, m), in one
        call; None where `draft` has to be asked token by token. See `OwnDraft.likeliest`."""
        assert self._draft is not None
        return self._draft.likeliest(first, length, candidates=candidates, least=least, eos=eos)

    def goes_on_from(self, earlier: Target) -> bool:
        """See `LastingTarget.goes_on_from`."""
        return isinstance(earlier, LeanTarget) and self._weights is earlier._weights and earlier._cache.gaps is None

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond these lengths, one for each row."""
        self._draft = None
        self._cache.crop(lengths)

    def export(self, cache: Cache, columns: int | None = None) -> None:
        """Put the text's keys and values (or those of its first columns) into an empty cache of transformers, at the
        columns that `generate` would give them: behind the padding, with the holes that the prompt's mask has."""
        self._cache.export(cache, columns)

    def _forward(
        self, ids: Tensor, tokens: Tokens, taps: Sequence[int], *, last_only: bool, real: Tensor | None = None
    ) -> TargetOutput:
        weights, kv = self._weights, self._cache.kv
        batch, count = ids.shape
        end = len(weights.layers)
        one_row = last_only and batch == 1 and end not in taps
        with torch.inference_mode():
            x = F.embedding(ids.flatten(), weights.embedding)
            fed = torch.empty_like(x) if weights.feeds_again else None
            if self._early is None:
                ran = weights.run.run(x, kv, tokens, range(end), head_output=fed, taps=taps, last_only=one_row)
            else:
                real = None if real is None else real.flatten()
                ran, depth = self._early.run(x, kv, tokens, head_output=fed, real=real, taps=taps, last_only=one_row)
                self._depths.last = depth.view(batch, count)
            x, tapped, _ = ran
        # from here on outside of inference mode, so that callers may write into what they get
        wanted = None
        if taps:
            if end in taps:
                # the last of transformers' hidden states is behind the final norm
                tapped[end] = F.rms_norm(x, x.shape[-1:], weights.final_gain, weights.eps)
            wanted = torch.stack([tapped[tap] for tap in taps], dim=1).view(batch, count, len(taps), -1)
        if last_only:
            x = x.view(batch, count, -1)[:, -1]
        return TargetOutput(logits=self._weights.logits(x).view(batch, 1 if last_only else count, -1), taps=wanted)

    def _note(self, kept: Sequence[Sequence[int]]) -> None:
        """Tell the call of `generate` how many cycles the tokens that are kept took."""
        if self._exits is not None:
            self._exits.tell(self._depths.keep(kept, self._cache))
