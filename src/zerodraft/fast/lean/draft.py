"""A looped model that drafts for itself on the lean path: the first cycles draft, all cycles verify.

Keys and values of head and first cycles depend on nothing but the same executions of earlier tokens, so those of a
drafted token are exactly those of the full pass. Verification goes on from the drafted tokens' states behind these
cycles. Tokens of the tree that were not drafted one after the other are brought there first; they take the slots behind
the drafted ones. Layers behind the drafting cycles write over what the draft has left in the tail.

Ideas: self-speculation with shared keys and values as in LayerSkip (Elhoushi et al., arXiv 2404.16710); of looped
models LoopSpec (arXiv 2609.17184).
"""

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from zerodraft.fast.compiled import CPU, PANEL, Draft, address
from zerodraft.fast.lean.cache import LeanCache
from zerodraft.fast.lean.exits import EarlyExit
from zerodraft.fast.lean.weights import LeanWeights


@dataclass(kw_only=True)
class OwnDraft:
    """Tokens that a model drafts for itself behind what is cached, the last known token first.

    **Fields:** `cycles` that every drafted token runs; `early` says where it stops, there or later. `states` are those
    behind these cycles, `fed` the head's outputs.
    """

    weights: LeanWeights
    cache: LeanCache
    cycles: int
    early: EarlyExit
    ids: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    fed: list[Tensor] = field(default_factory=list)

    def step(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B H"]:
        """The stream behind the tail after one more token of each text."""
        weights, cache, at = self.weights, self.cache, len(self.ids)
        cache.make_room(len(ids), at + 1)
        drafted = torch.arange(at, device=CPU).expand(len(ids), -1) if at else None
        tokens = cache.tokens(torch.full_like(ids, at), None, drafted=drafted)
        x = F.embedding(ids.flatten(), weights.embedding)
        fed = torch.empty_like(x) if weights.feeds_again else None
        states = torch.empty_like(x)
        ran, _ = self.early.run(
            x, cache.kv, tokens,
            head_output=fed, real=None, taps=(), last_only=False, note=(self.cycles, states),
        )  # fmt: skip
        self.ids.append(int(ids[0, 0]))
        self.states.append(states)
        if fed is not None:
            self.fed.append(fed)
        return ran.x

    def likeliest(
        self, first: int, length: int, *, candidates: int, least: float, eos: Collection[int]
    ) -> tuple[Int64[np.ndarray, "k m"], Float32[np.ndarray, "k m"]] | None:
        """A text's whole draft in one call of the kernels: the likeliest tokens behind `first`, each with the other
        candidates, and their log-probabilities; None where Python has a part in it. It ends behind a token of `eos` and
        where the logarithm of the chance that all of it is right is below `least`."""
        cache, compiled, head, embedding = self.cache, self.early.compiled, self.weights.head, self.weights.embedding
        size, hidden = embedding.shape
        if compiled is None or head.panels is None or not 0 <= first < head.out_features <= size:
            return None
        cache.make_room(1, length)
        if len(cache.lengths) > 1 or not embedding.is_contiguous() or (tokens := cache.one_by_one(length)) is None:
            return None
        x, states = torch.empty(2, length, hidden, dtype=torch.float32, device=CPU)
        logits = torch.empty(head.out_features, dtype=torch.float32, device=CPU)
        fed = torch.empty_like(x) if self.weights.feeds_again else None
        ids = np.empty((length, min(candidates, head.out_features)), np.int64)
        log_q = np.empty(ids.shape, np.float32)
        ends = (ctypes.c_int64 * len(eos))(*eos)
        panels = -(-head.out_features // PANEL), hidden, PANEL
        own = Draft(
            first=first,
            vocabulary=head.out_features,
            narrow=head.panel_dtype == torch.bfloat16,
            candidates=ids.shape[1],
            eos_count=len(eos),
            least=least,
            eos=ctypes.addressof(ends),
            embedding=address(embedding, (size, hidden)),
            head=address(head.panels, panels, head.panel_dtype),
            head_bias=None if head.bias is None else address(head.bias, (head.out_features,)),
            head_gain=None if head.gain is None else address(head.gain, (hidden,)),
            logits=logits.data_ptr(),
            ids=ids.ctypes.data,
            log_q=log_q.ctypes.data,
        )
        count = compiled.draft(x, cache.kv, tokens, own, head_output=fed, note=(self.cycles, states))
        ids, log_q = ids[:count], log_q[:count]
        self.ids += [first, *ids[:-1, 0].tolist()]
        self.states += states[:count].split(1)
        if fed is not None:
            self.fed += fed[:count].split(1)
        return ids, log_q

    def verify(
        self, ids: Int[Tensor, "1 T"], depth: Int[Tensor, "1 T"], visible: Bool[Tensor, "1 T T"]
    ) -> tuple[Float[Tensor, "T H"], list[int] | None]:
        """The stream behind the last layer of a tree's nodes, and the slot of each one behind what is kept, where they
        are not in order."""
        weights, cache, layers = self.weights, self.cache, self.weights.run
        known = self._find(ids[0].tolist(), depth[0].tolist(), visible[0].tolist())
        others = [node for node in range(ids.shape[1]) if node not in known]
        order, count = [*known, *others], len(known)
        places = None
        if order != list(range(len(order))):
            by = torch.tensor(order, device=CPU)
            ids, depth, visible, places = ids[:, by], depth[:, by], visible[:, by][:, :, by], by.argsort()
        assert weights.stages is not None
        first, end = weights.stages.cycle(self.cycles).stop, len(weights.layers)
        states, fed = self.states[:count], self.fed[:count]
        tokens = cache.tokens(depth, visible)
        if others:
            x = F.embedding(ids[0, count:], weights.embedding)
            states, fed = [*states, x], [*fed, *([torch.empty_like(x)] if weights.feeds_again else [])]
        x, again = torch.cat(states), torch.cat(fed) if fed else None
        if others:
            x = layers.catch_up(x, cache.kv, tokens, count, first, head_output=again)
        else:
            x = layers.run(x, cache.kv, tokens, range(first, end), head_output=again).x
        return (x, None) if places is None else (x[places], places.tolist())

    def _find(self, ids: Sequence[int], depth: Sequence[int], visible: Sequence[Sequence[bool]]) -> list[int]:
        """The nodes that are the first drafted tokens, one after the other."""
        found: list[int] = []
        for at, token in enumerate(self.ids):
            here = (node for node in range(len(ids)) if depth[node] == at and ids[node] == token)
            node = next((node for node in here if not found or visible[node][found[-1]]), None)
            if node is None:
                break
            found.append(node)
        return found
