"""Causal-consistency path search (CPS): from a lattice to the paths worth verifying.

A drafter that fills all positions at once does not know which of its candidates go together. CPS (DiffuSpec, arXiv
2510.02358) prunes each position to the smallest set of top candidates whose mass reaches tau, stops after the first
position where the drafter's choice is an EOS, and runs a beam search from left to right over
`lam * log q + (1 - lam) * log p`, p being a small causal model, the proxy.

Ours: the same scores can grow a tree best-first (`expand="best_first"`), which holds the `budget` likeliest prefixes of
the whole lattice rather than a few complete paths; and a draft can be sampled from the pruned lattice.

Not public, so chosen here: EOS is kept beyond `m_max` if need be; a path through an EOS in mid-lattice is searched like
any other and then cut. A drafted EOS saves the target nothing (it emits the same EOS either way), so deterministic
drafts end before it.

Legend: q drafter, p proxy, k positions, m candidates of a position, b states of the beam.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from zerodraft.decoding.lattice import NO_TOKEN, Lattice
from zerodraft.decoding.tree import DraftTree, SampledDraft
from zerodraft.decoding.verify import Randomness
from zerodraft.errors import ZerodraftError

Expand = Literal["beam", "best_first"]


@runtime_checkable
class ProxySession(Protocol):
    """A proxy that follows one row of a generate call. States are opaque and hashable."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of known tokens: the prompt, then whatever each step emits."""
        ...

    def root(self) -> Hashable:
        """The state after all known tokens."""
        ...

    def score(self, states: Sequence[Hashable], candidates: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "b m"]:
        """log p(candidate | state), natural, finite, at most 0."""
        ...

    def advance(self, state: Hashable, token: int) -> Hashable:
        """The state one token further. Pure."""
        ...

    def table(self, ids: Int64[np.ndarray, "k m"]) -> Float32[np.ndarray, "k m m m"] | None:
        """All scores of a lattice at once, where the proxy looks back at most two tokens (None elsewhere): entry
        [i, a, b, c] is that of candidate c of position i after candidates a and b of the two positions before it.
        Known tokens stand in before position 0, so [0] is the same for all a and b, [1] for all a."""
        ...


@runtime_checkable
class CausalProxy(Protocol):
    """A small causal language model that says which candidates go together."""

    def start(self) -> ProxySession:
        """A session for one row."""
        ...


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
    ids, log_q = lattice.ids, lattice.log_q.astype(np.float64)
    if not len(lattice):
        return lattice
    eos = np.isin(ids, list(eos_ids))
    k = int(eos[:, 0].argmax()) + 1 if eos[:, 0].any() else len(lattice)
    ids, log_q, eos = ids[:k], log_q[:k], eos[:k]
    mass = np.exp(log_q)
    before = mass.cumsum(1) - mass
    keep = (before < config.tau) & (np.arange(ids.shape[1]) < config.m_max) & (ids != NO_TOKEN)
    keep[:, 0] |= ids[:, 0] != NO_TOKEN
    keep |= eos
    rows = [np.flatnonzero(row) for row in keep]
    m = max(len(row) for row in rows)
    pruned_ids = np.full((k, m), NO_TOKEN, np.int64)
    pruned_q = np.full((k, m), -np.inf, np.float32)
    for i, row in enumerate(rows):
        pruned_ids[i, : len(row)] = ids[i, row]
        pruned_q[i, : len(row)] = lattice.log_q[i, row]
    return Lattice(pruned_ids, pruned_q, lattice.chain)


def beam(pruned: Lattice, config: SearchConfig, proxy: ProxySession | None = None) -> list[ScoredPath]:
    """The `config.beam` best paths through a pruned lattice, best first; ties go to the drafter's order."""
    paths: list[tuple[float, list[int]]] = [(0.0, [])]
    states = [proxy.root()] if proxy else []
    lam = config.lam if proxy else 1.0
    for ids, log_q in zip(pruned.ids, pruned.log_q.astype(np.float64), strict=True):
        ids, log_q = ids[ids != NO_TOKEN], log_q[ids != NO_TOKEN]
        scores = np.array([score for score, _ in paths])[:, None] + lam * log_q
        if proxy:
            scores = scores + (1 - lam) * proxy.score(states, ids)
        best = np.argsort(-scores, axis=None, kind="stable")[: config.beam].tolist()
        m = len(ids)
        if proxy:
            states = [proxy.advance(states[at // m], int(ids[at % m])) for at in best]
        paths = [(float(scores.flat[at]), [*paths[at // m][1], int(ids[at % m])]) for at in best]
    return [ScoredPath(tokens, score) for score, tokens in paths]


def build_tree(
    lattice: Lattice,
    config: SearchConfig,
    proxy: ProxySession | None = None,
    eos_ids: Collection[int] = (),
    *,
    tree: bool = True,
) -> DraftTree:
    """The draft to verify: a tree of at most `config.budget` nodes, or (`tree=False`) the best path alone."""
    pruned = prune(lattice, config, eos_ids)
    if not len(pruned):
        return DraftTree.path([])
    if pruned.chain:
        return DraftTree.path(cut(pruned.ids[:, 0].tolist(), eos_ids)[: config.budget])
    paths = [cut(path.tokens, eos_ids) for path in beam(pruned, config, proxy)]
    return DraftTree.from_paths(paths if tree else paths[:1], config.budget)


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
    after it do not follow from it. Both depend on the path so far alone, as exactness asks.
    """
    pruned = prune(lattice, config, eos_ids)
    q = np.exp(pruned.log_q.astype(np.float64))
    q /= q.sum(1, keepdims=True)
    paths = []
    for _ in range(config.beam if tree and len(pruned) else 1):
        path = []
        for ids, at in zip(pruned.ids.tolist(), dice.pick(q).tolist(), strict=True):
            path.append(ids[at])
            if ids[at] in eos_ids or (pruned.chain and at):
                break
        paths.append(path)
    return SampledDraft.from_paths(paths, pruned.ids, q)
