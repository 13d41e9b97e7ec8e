"""A looped model that drafts for itself on the lean path: the first cycles draft, all cycles verify.

Keys and values of head and first cycles depend on nothing but the same executions of earlier tokens, so those of a
drafted token are exactly those of the full pass. Verification goes on from the drafted tokens' states behind these
cycles. Tokens of the tree that were not drafted one after the other are brought there first; they take the slots behind
the drafted ones. Layers behind the drafting cycles write over what the draft has left in the tail.

Ideas: self-speculation with shared keys and values as in LayerSkip (Elhoushi et al., arXiv 2404.16710); of looped
models LoopSpec (arXiv 2609.17184).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zerodraft.fast.compiled import CPU
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
