"""Causal-consistency path search (CPS): from a lattice to the paths worth verifying.

A drafter that fills all positions at once does not know which of its candidates go together. CPS (DiffuSpec, arXiv
2510.02358) prunes each position to the smallest set of top candidates whose mass reaches tau, stops after the first
position where the drafter's choice is an EOS, and runs a beam search from left to right over
`lam * log q + (1 - lam) * log p`, p being a small causal model, the proxy (`scorers.py`).

Ours: the same scores can grow a tree best-first (`expand="best_first"`), which holds the `budget` likeliest prefixes of
the whole lattice rather than a few complete paths; and a draft can be sampled from the pruned lattice.

Not public, so chosen here: EOS is kept beyond `m_max` if need be; a path through an EOS in mid-lattice is searched like
any other and then cut. A drafted EOS saves the target nothing (it emits the same EOS either way), so deterministic
drafts end before it.

Legend: q drafter, p proxy, k positions, m candidates of a position, b states of the beam.
"""

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float32, Float64

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import NO_TOKEN, Lattice
from zerodraft.decoding.scorers import ProxySession, scorer
from zerodraft.decoding.tree import ROOT, DraftTree, SampledDraft
from zerodraft.decoding.verify import Randomness

Expand = Literal["beam", "best_first"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How a lattice becomes a draft; the defaults are the published ones.

    Attributes:
        tau: Mass of the candidates kept at a position.
        m_max: Most candidates kept at a position.
        beam: Width B of the beam search; of a sampled draft, the number of paths.
        lam: Weight of the drafter's log-probability against the proxy's.
        expand: Which tree to verify: the beam's paths, or the best-first tree.
        budget: Most nodes of the tree. None: as many as the beam's paths need; best-first, as many as positions.
    """

    tau: float = 0.8
    m_max: int = 15
    beam: int = 3
    lam: float = 0.5
    expand: Expand = "beam"
    budget: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("tau", 0, 1), ("lam", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ZerodraftError(f"{name}={getattr(self, name)} is out of range; give a number from 0 to 1.")
        for name in ("m_max", "beam", "budget"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ZerodraftError(f"{name}={getattr(self, name)} is too small; give at least 1.")
        if self.expand not in get_args(Expand):
            raise ZerodraftError(f"expand={self.expand!r} is unknown; choose one of {', '.join(get_args(Expand))}.")


class ScoredPath(NamedTuple):
    """A path through the lattice and its score, the sum over its positions."""

    tokens: list[int]
    score: float


def prune(lattice: Lattice, config: SearchConfig, eos_ids: Collection[int] = ()) -> Lattice:
    """The lattice with each position's smallest set of top candidates whose mass reaches `tau` (at most `m_max`, and
    every EOS among the candidates), up to the first position whose top candidate is an EOS."""
    ids, log_q = lattice.ids, lattice.log_q
    k = 0
    for token, score in zip(ids[:, 0].tolist(), log_q[:, 0].tolist(), strict=True):
        if token == NO_TOKEN or score == -np.inf:
            break
        k += 1
        if token in eos_ids:
            break
    ids, log_q = ids[:k], log_q[:k]
    pairs = None if lattice.pairs is None else lattice.pairs[:k]
    if not k:
        return Lattice(ids, log_q, lattice.chain)
    mass = np.exp(log_q, dtype=np.float64).cumsum(1)
    if np.isnan(mass[:, -1]).any():
        raise ZerodraftError("The drafter's log-probabilities hold NaN; check its weights, or run it in a wider dtype.")
    keep = np.empty(ids.shape, bool)
    keep[:, 0] = True
    keep[:, 1:] = mass[:, :-1] < config.tau
    keep[:, config.m_max :] = False
    for eos in eos_ids:
        keep |= ids == eos
    keep &= log_q > -np.inf
    if (keep[:, 1:] > keep[:, :-1]).any():
        # an EOS from further down moves up to the others
        order = (~keep).argsort(1, kind="stable")
        ids, log_q, keep = (np.take_along_axis(x, order, 1) for x in (ids, log_q, keep))
        if pairs is not None:
            pairs = np.take_along_axis(pairs, order[:, None], 2)
            pairs[1:] = np.take_along_axis(pairs[1:], order[:-1, :, None], 1)
    m = int(keep.sum(1).max())
    keep = keep[:, :m]
    return Lattice(
        np.where(keep, ids[:, :m], NO_TOKEN),
        np.where(keep, log_q[:, :m], np.float32(-np.inf)),
        lattice.chain,
        pairs=None if pairs is None else pairs[:, :m, :m],
    )


def beam(pruned: Lattice, config: SearchConfig, proxy: ProxySession | None = None) -> list[ScoredPath]:
    """The `config.beam` best paths through a pruned lattice, best first; ties go to the drafter's order."""
    if not len(pruned):
        return [ScoredPath([], 0.0)]
    scores = scorer(pruned, config.lam, proxy)
    candidates = (pruned.ids != NO_TOKEN).sum(1).tolist()
    contexts = scores.root()
    totals = np.zeros(1, np.float32)
    steps: list[tuple[list[int], list[int]]] = []
    for i, m in enumerate(candidates):
        costs = totals[:, None] + scores.costs(i, contexts)
        best = costs.argsort(axis=None, kind="stable")[: min(config.beam, m * len(totals))]
        totals = costs.take(best)
        width = costs.shape[1]
        # so few that lists are faster than arrays
        at = best.tolist()
        parents = [x // width for x in at]
        columns = [x % width for x in at]
        contexts = scores.extend(i, contexts, parents, columns)
        steps.append((parents, columns))
    paths = []
    ids = pruned.ids.tolist()
    for rank, cost in enumerate(totals.tolist()):
        tokens = []
        for i in range(len(steps) - 1, -1, -1):
            parents, columns = steps[i]
            tokens.append(ids[i][columns[rank]])
            rank = parents[rank]
        paths.append(ScoredPath(tokens[::-1], -cost * scores.unit))
    return paths


class RankedTree(NamedTuple):
    """A tree whose nodes come likeliest first, and how likely each is taken to be accepted."""

    tree: DraftTree
    chances: Float64[np.ndarray, " n"]


def best_first(
    pruned: Lattice,
    config: SearchConfig,
    budget: int,
    proxy: ProxySession | None = None,
    eos_ids: Collection[int] = (),
) -> RankedTree:
    """The tree of the `budget` best prefixes of a pruned lattice. A prefix scores the sum over its positions, which
    only falls along a path, so the best are found from the root outwards. In a chain first candidates alone have
    children.
    """
    if not len(pruned):
        return RankedTree(DraftTree.path([]), np.empty(0))
    scores = scorer(pruned, config.lam, proxy)
    ids = pruned.ids.tolist()
    live = [[at for at, token in enumerate(row) if token != NO_TOKEN and token not in eos_ids] for row in ids]
    tokens: list[int] = []
    parents: list[int] = []
    costs: list[float] = []
    # Of a node's children only the best that is not yet in the tree waits in the heap, with its siblings behind it. The
    # counter settles ties by age.
    heap: list[tuple[float, int, int, int, list[tuple[float, int]], Any]] = []
    pushed = 0

    def push(depth: int, parent: int, siblings: list[tuple[float, int]], contexts: Any) -> None:
        nonlocal pushed
        if siblings:
            heapq.heappush(heap, (siblings[-1][0], pushed, depth, parent, siblings, contexts))
            pushed += 1

    def children(depth: int, cost: float, contexts: Any) -> list[tuple[float, int]]:
        row = scores.costs_after(depth, contexts[0])
        return sorted([(cost + row[at], at) for at in live[depth] if row[at] < np.inf], reverse=True)

    push(0, ROOT, children(0, 0.0, scores.root()), scores.root())
    while heap and len(tokens) < budget:
        _, _, depth, parent, siblings, contexts = heapq.heappop(heap)
        cost, at = siblings.pop()
        node = len(tokens)
        tokens.append(ids[depth][at])
        parents.append(parent)
        costs.append(cost)
        push(depth, parent, siblings, contexts)
        if depth + 1 < len(ids) and not (pruned.chain and at):
            after = scores.extend(depth, contexts, [0], [at])
            push(depth + 1, node, children(depth + 1, cost, after), after)
    return RankedTree(DraftTree.from_lists(tokens, parents), np.exp(-scores.unit * np.array(costs)))


def merge(parts: Sequence[RankedTree], budget: int) -> RankedTree:
    """One tree of the `budget` likeliest nodes of several; a node that several have is as likely as the likeliest."""
    if len(parts) == 1:
        return RankedTree(parts[0].tree.first(budget), parts[0].chances[:budget])
    nodes = [(-chance, part, node) for part, (_, chances) in enumerate(parts) for node, chance in enumerate(chances)]
    places: list[dict[int, int]] = [{ROOT: ROOT} for _ in parts]
    children: list[dict[int, int]] = [{}]
    tokens: list[int] = []
    parents: list[int] = []
    chances: list[float] = []
    for cost, part, node in sorted(nodes):
        tree = parts[part].tree
        place = places[part].get(int(tree.parents[node]))
        if place is None:
            continue
        token = int(tree.tokens[node])
        child = children[place + 1].get(token)
        if child is None:
            if len(tokens) == budget:
                continue
            child = children[place + 1][token] = len(tokens)
            children.append({})
            tokens.append(token)
            parents.append(place)
            chances.append(-cost)
        places[part][node] = child
    return RankedTree(DraftTree.from_lists(tokens, parents), np.array(chances))


def build_tree(
    lattice: Lattice,
    config: SearchConfig,
    proxy: ProxySession | None = None,
    eos_ids: Collection[int] = (),
    *,
    tree: bool = True,
    worth: Callable[[Float64[np.ndarray, " n"]], int] | None = None,
) -> DraftTree:
    """The draft to verify: a tree of at most `config.budget` nodes, or (`tree=False`) the best path alone. A chain's
    best path is its first candidates, whatever a proxy says.

    `worth` is told how likely the nodes of a best-first tree are, likeliest first, and says how many to verify.
    """
    pruned = [prune(part, config, eos_ids) for part in lattice.parts()]
    if tree and config.expand == "best_first":
        budget = config.budget or len(lattice)
        ranked = merge([best_first(part, config, budget, proxy, eos_ids) for part in pruned], budget)
        return ranked.tree if worth is None else ranked.tree.first(worth(ranked.chances))
    paths: list[list[int]] = []
    for part in pruned:
        if part.chain:
            paths.append(part.ids[:, 0].tolist())
        else:
            paths += [path.tokens for path in beam(part, config, proxy)]
    return DraftTree.from_paths([cut(path, eos_ids) for path in (paths if tree else paths[:1])], config.budget)


def cut(tokens: list[int], eos_ids: Collection[int]) -> list[int]:
    """The tokens before the first EOS."""
    for i, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[:i]
    return tokens


def sample_draft(
    lattice: Lattice,
    config: SearchConfig,
    dice: Randomness,
    eos_ids: Collection[int] = (),
    *,
    tree: bool = True,
) -> SampledDraft:
    """`config.beam` paths (`tree=False`: one) drawn from the pruned candidates' renormalised distributions.

    A path ends with its first EOS; in a chain also with the first token that is not the drafter's own, since the rows
    after it do not follow from it. Both depend on the path so far alone, as exactness asks. A chain that the drafter
    drew itself is taken as it is, with the distributions that it was drawn from.
    """
    if lattice.drawn:
        first = lattice.ids[:, 0].tolist()
        k = next(
            (i + (token != NO_TOKEN) for i, token in enumerate(first) if token in (NO_TOKEN, *eos_ids)), len(first)
        )
        return SampledDraft.from_paths([first[:k]], lattice.ids[:k], _normalised(lattice.log_q[:k]))
    pruned = prune(lattice, config, eos_ids)
    q = _normalised(pruned.log_q)
    paths = []
    for _ in range(config.beam if tree and len(pruned) else 1):
        path = []
        for ids, at in zip(pruned.ids.tolist(), dice.pick(q).tolist(), strict=True):
            path.append(ids[at])
            if ids[at] in eos_ids or (pruned.chain and at):
                break
        paths.append(path)
    return SampledDraft.from_paths(paths, pruned.ids, q)


def _normalised(log_q: Float32[np.ndarray, "k m"]) -> Float64[np.ndarray, "k m"]:
    q = np.exp(log_q, dtype=np.float64)
    return q / q.sum(1, keepdims=True)
