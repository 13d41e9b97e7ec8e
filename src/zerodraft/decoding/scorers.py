"""What a candidate of a lattice costs after a path: the drafter's log-probabilities, alone or weighed with a proxy's.

The score of the path search is `lam * log q + (1 - lam) * log p` (DiffuSpec, arXiv 2510.02358), q being the drafter and
p a small causal model, the proxy. The search asks a `Scorer` for the costs (negated scores) of a position's candidates
after each of several contexts; what a context is depends on how far back the scores look.

Legend: q drafter, p proxy, k positions, m candidates of a position, b contexts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from zerodraft.decoding.lattice import NO_TOKEN, Lattice


class LatticeScores(NamedTuple):
    """What a proxy that looks back two tokens at most says about a whole lattice: candidate c of position i, after
    candidates a and b of the two positions before it, scores `pairs[i, b, c] + extra[i, a, b, c]`.

    Known tokens stand in before position 0, so position 0 scores the same for all a and b, position 1 for all a. In two
    parts because `extra` is mostly zero, and only what the search visits of it is ever read.
    """

    pairs: Float32[np.ndarray, "k m m"]
    extra: Float32[np.ndarray, "k m m m"]


@runtime_checkable
class ProxySession(Protocol):
    """A proxy that follows one row of a generate call. What its states are is its own affair."""

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of known tokens: the prompt, then whatever each step emits."""
        ...

    def root(self) -> Any:
        """The state after all known tokens."""
        ...

    def score(self, states: Sequence[Any], candidates: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "b m"]:
        """log p(candidate | state), natural, finite, at most 0."""
        ...

    def advance(self, state: Any, token: int) -> Any:
        """The state one token further. Pure."""
        ...

    def table(self, ids: Int64[np.ndarray, "k m"]) -> LatticeScores | None:
        """All scores of a lattice at once, where the proxy looks back at most two tokens (None elsewhere)."""
        ...


@runtime_checkable
class CausalProxy(Protocol):
    """A small causal language model that says which candidates go together."""

    def start(self) -> ProxySession:
        """A session for one row."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Costs (negated scores, in units of `unit`) of the candidates of a position, for each of several contexts; padding
    costs infinity."""

    unit: float

    def root(self) -> list[Any]:
        """The context before position 0."""
        ...

    def costs(self, i: int, contexts: list[Any]) -> Float[np.ndarray, "b m"]:
        """Of all candidates of position i after each context (one row may stand for all)."""
        ...

    def costs_after(self, i: int, context: Any) -> list[float]:
        """The same after one context."""
        ...

    def extend(self, i: int, contexts: list[Any], parents: list[int], columns: list[int]) -> list[Any]:
        """The contexts after a candidate (a column) of position i each."""
        ...


def scorer(pruned: Lattice, lam: float, proxy: ProxySession | None) -> Scorer:
    """The scorer of a pruned lattice. A chain's rows follow from each other, so a proxy has no say there."""
    if proxy is None or pruned.chain:
        lam = 1.0
    # where: a weight of 0 times minus infinity would be NaN
    if pruned.pairs is None:
        q_cost = np.full((len(pruned), 1, pruned.ids.shape[1]), np.inf)
        np.multiply(pruned.log_q[:, None], -lam, out=q_cost, where=(pruned.ids != NO_TOKEN)[:, None])
    else:
        q_cost = np.full(pruned.pairs.shape, np.inf)
        np.multiply(pruned.pairs, -lam, out=q_cost, where=(pruned.ids != NO_TOKEN)[:, None])
    if proxy is None or lam == 1:
        return _Independent(q_cost) if pruned.pairs is None else _Paired(q_cost)
    table = proxy.table(pruned.ids)
    return _Stepped(q_cost, lam, proxy, pruned.ids) if table is None else _Tabled(q_cost, lam, table)


class _Independent:
    """A candidate costs the same after any path."""

    unit = 1.0

    def __init__(self, q_cost: Float64[np.ndarray, "k 1 m"]) -> None:
        self.q_cost = q_cost

    def root(self) -> list[None]:
        return [None]

    def costs(self, i: int, contexts: list[None]) -> Float[np.ndarray, "1 m"]:
        return self.q_cost[i]

    def costs_after(self, i: int, context: None) -> list[float]:
        return self.q_cost[i, 0].tolist()

    def extend(self, i: int, contexts: list[None], parents: list[int], columns: list[int]) -> list[None]:
        return contexts


class _Paired:
    """The drafter's own scores of neighbours; a context is the column of the candidate before."""

    unit = 1.0

    def __init__(self, q_cost: Float64[np.ndarray, "k m m"]) -> None:
        self.q_cost = q_cost

    def root(self) -> list[int]:
        return [0]

    def costs(self, i: int, contexts: list[int]) -> Float[np.ndarray, "b m"]:
        return self.q_cost[i].take(contexts, 0)

    def costs_after(self, i: int, context: int) -> list[float]:
        return self.q_cost[i, context].tolist()

    def extend(self, i: int, contexts: list[int], parents: list[int], columns: list[int]) -> list[int]:
        return columns


class _Tabled:
    """A proxy with a table; a context is m * a + b of the columns (a, b) of the two positions before."""

    def __init__(self, q_cost: Float64[np.ndarray, "k n m"], lam: float, table: LatticeScores) -> None:
        k, _, self.m = q_cost.shape
        # in units of the proxy's weight, so that the table need not be multiplied
        self.unit = 1 - lam
        pairs = (q_cost / self.unit - table.pairs).astype(np.float32)
        # all at once: most is never read, but picking what is costs more
        self.table = (pairs[:, None] - table.extra).reshape(k, -1, self.m)

    def root(self) -> list[int]:
        return [0]

    def costs(self, i: int, contexts: list[int]) -> Float[np.ndarray, "b m"]:
        return self.table[i].take(contexts, 0)

    def costs_after(self, i: int, context: int) -> list[float]:
        return self.table[i, context].tolist()

    def extend(self, i: int, contexts: list[int], parents: list[int], columns: list[int]) -> list[int]:
        m = self.m
        return [contexts[p] % m * m + c for p, c in zip(parents, columns, strict=True)]


class _Stepped:
    """A proxy that looks back further; a context is its own state and the column of the candidate before."""

    unit = 1.0

    def __init__(
        self, q_cost: Float64[np.ndarray, "k n m"], lam: float, proxy: ProxySession, ids: Int64[np.ndarray, "k m"]
    ) -> None:
        self.q_cost, self.weight, self.proxy = q_cost, lam - 1, proxy
        self.ids = [row[: int((row != NO_TOKEN).sum())] for row in ids]

    def root(self) -> list[tuple[Any, int]]:
        return [(self.proxy.root(), 0)]

    def costs(self, i: int, contexts: list[tuple[Any, int]]) -> Float[np.ndarray, "b m"]:
        ids, q_cost = self.ids[i], self.q_cost[i]
        if len(q_cost) > 1:
            q_cost = q_cost.take([column for _, column in contexts], 0)
        return q_cost[:, : len(ids)] + self.weight * self.proxy.score([state for state, _ in contexts], ids)

    def costs_after(self, i: int, context: tuple[Any, int]) -> list[float]:
        return self.costs(i, [context])[0].tolist()

    def extend(
        self, i: int, contexts: list[tuple[Any, int]], parents: list[int], columns: list[int]
    ) -> list[tuple[Any, int]]:
        ids = self.ids[i]
        return [(self.proxy.advance(contexts[p][0], int(ids[c])), c) for p, c in zip(parents, columns, strict=True)]
