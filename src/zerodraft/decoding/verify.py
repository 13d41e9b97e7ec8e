"""Which drafted tokens the target keeps: exact, whatever the draft.

A draft chosen deterministically is a point mass at each node: take the target's own token x, drawn from its processed
distribution p (or its argmax); if a child of the node equals x, go on from there, else emit x and stop. What is emitted
is then always the target's own draw. When the draft was itself drawn from q, accept it with probability min(1, p/q) and
replace it by a draw from the rest (p - q)+ otherwise (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318);
several draws at one node are tried in turn, each against what the ones before left of p (SpecInfer, 2305.09781).

Nothing here knows a model. `probs(node)` is asked for the nodes on the accepted path alone, so that processors that
look at the tokens so far see each node's own prefix and cost nothing elsewhere.

Legend: p target, q draft; nodes as in `tree`: ROOT is the last known token, node i is at index i + 1 of arrays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.tree import ROOT, DraftTree, SampledDraft

NO_NUMBERS = "The target's logits hold NaN or infinity; check its weights, or run it in a wider dtype."

Probabilities = Callable[[int], Any]
"""The target's processed distribution over the token after a node: a tensor of shape (V,) that sums to one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verification yields: the nodes of the accepted path, in order, and the target's own token after them.

    A drafted EOS can be among the kept; whatever follows it is the caller's to cut.
    """

    kept: list[int]
    token: int


@runtime_checkable
class Randomness(Protocol):
    """The three random choices that drafting and verifying make."""

    def draw(self, p: Float[Tensor, " V"]) -> int:
        """A token from p."""
        ...

    def accept(self, p: Float[Tensor, ""], q: float) -> bool:
        """True with probability min(1, p / q)."""
        ...

    def pick(self, q: Float64[np.ndarray, "k m"]) -> Int64[np.ndarray, " k"]:
        """One column for each row, drawn from the row."""
        ...


class Dice:
    """Randomness from a torch generator, on whatever device (None: the global one of the device)."""

    def __init__(self, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> None:
        # a generator draws where it lives
        self.device = device if generator is None else generator.device
        self.generator = generator

    def draw(self, p: Float[Tensor, " V"]) -> int:
        try:
            return int(torch.multinomial(p.to(self.device), 1, generator=self.generator))
        except RuntimeError as error:
            raise ZerodraftError(
                f"The target's probabilities are not a distribution ({error}); check its weights and logits processors."
            ) from None

    def accept(self, p: Float[Tensor, ""], q: float) -> bool:
        u = torch.rand((), generator=self.generator, dtype=torch.float32, device=self.device)
        return bool(u * q < p.to(self.device))

    def pick(self, q: Float64[np.ndarray, "k m"]) -> Int64[np.ndarray, " k"]:
        u = torch.rand(len(q), 1, generator=self.generator, dtype=torch.float32, device=self.device)
        edges = q.cumsum(1)
        # scaled by the last edge, so that rounding never lands on padding
        return (edges > u.cpu().double().numpy() * edges[:, -1:]).argmax(1)


def greedy(logits: Float[Tensor, "B n V"]) -> Callable[[int, int], int]:
    """`choose(row, node)`: the greedy token after a node of a row.

    On a CPU it is looked for where it is asked for, along the accepted path. Elsewhere one argmax over all nodes of all
    rows and one transfer to the host come first.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # numpy's argmax is ten times as fast as torch's, and like it takes the first of equals
        scores, found = logits.detach().numpy(), []
    else:
        # float32 holds every token id below 16 million, and not every device knows doubles
        scores, found = None, torch.stack([part.float() for part in logits.max(-1)], -1).tolist()

    def choose(row: int, node: int) -> int:
        if scores is not None:
            of_node = scores[row, node + 1]
            token = of_node.argmax()
            score = of_node[token]
        else:
            score, token = found[row][node + 1]
        # the highest of scores with a NaN among them is a NaN
        if not math.isfinite(score):
            raise ZerodraftError(NO_NUMBERS)
        return int(token)

    return choose


def walk(tree: DraftTree, choose: Callable[[int], int]) -> Verdict:
    """Follow the target's own tokens through the tree: `choose(node)` is the one after a node, asked once for each node
    of the accepted path. Exact for every deterministic draft if `choose` draws from the target's distribution."""
    nodes = list(enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)))
    kept: list[int] = []
    node = ROOT
    while True:
        wanted = (node, choose(node))
        child = next((child for child, found in nodes[node + 1 :] if found == wanted), None)
        if child is None:
            return Verdict(kept, wanted[1])
        kept.append(child)
        node = child


def point_mass(tree: DraftTree, probs: Probabilities, dice: Randomness) -> Verdict:
    """Sampling, for a draft that was chosen deterministically."""
    return walk(tree, lambda node: dice.draw(probs(node)))


def sampled(draft: SampledDraft, probs: Probabilities, dice: Randomness) -> Verdict:
    """Sampling, for a draft that was drawn from q."""
    tokens = draft.tree.tokens.tolist()
    kept: list[int] = []
    node = ROOT
    while True:
        p = probs(node)
        for child in draft.attempts[node + 1]:
            ids, q = draft.ids[len(kept)], draft.q[len(kept)]
            if dice.accept(p[tokens[child]], float(q[ids == tokens[child]].sum())):
                kept.append(child)
                node = child
                break
            p = residual(p, ids, q)
        else:
            return Verdict(kept, dice.draw(p))


def residual(p: Float[Tensor, " V"], ids: Int64[np.ndarray, " m"], q: Float64[np.ndarray, " m"]) -> Float[Tensor, " V"]:
    """(p - q)+, normalised: what p has left where q proposed too much."""
    real = q > 0
    at = torch.as_tensor(ids[real], device=p.device)
    rest = p.index_add(0, at, torch.as_tensor(-q[real], dtype=p.dtype, device=p.device)).clamp_min(0)
    total = rest.sum()
    # p = q leaves nothing; a rejection is then a matter of rounding, and p itself is the right answer
    return torch.where(total > 0, rest / total, p)
