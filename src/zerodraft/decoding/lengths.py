"""How many positions to draft next.

`AdaptiveLength` is the published controller of DiffuSpec (ADL, arXiv 2510.02358): moving averages of what the drafter
fills before its EOS and of what the target accepts. `CostAwareLength` and `CostAwareTree` are ours: they read what a
step costs on this machine (`costs.py`), and take the length of a path, or of each tree the nodes, that promise the most
tokens per second.

A controller is one row's. `fresh` gives another row, or the next call, its own with the same settings; what was learnt
about all rows is shared. Whether to draft at all is not theirs to decide, but the policy's (`policy.py`).
"""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.costs import Costs


@runtime_checkable
class DraftLength(Protocol):
    """Decides the length of each draft of one row."""

    def fresh(self, costs: Costs) -> "DraftLength":
        """A controller for another row or call, with the same settings, which reads these costs."""
        ...

    def next_length(self) -> int:
        """Positions to ask the drafter for."""
        ...

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        """Take note of a step: positions asked for, those that the drafter filled before its EOS, and those that the
        target accepted."""
        ...

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        """How many nodes of a draft tree to verify, given how likely each is taken to be accepted, likeliest first."""
        ...


@dataclass(slots=True)
class FixedLength:
    """Always k positions."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ZerodraftError(f"k={self.k} is not a draft length; give 0 or more.")

    def fresh(self, costs: Costs) -> "FixedLength":
        return self

    def next_length(self) -> int:
        return self.k

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        """Nothing to learn."""

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        """All."""
        return len(chances)


@dataclass(kw_only=True, slots=True)
class AdaptiveLength:
    """k = clip(floor(EMA of generated) + delta * [EMA of accepted >= EMA of generated], k_min, k_max).

    How the averages start is not public: here the first draft has k_min positions and the first step sets both.

    Attributes:
        k_min: Fewest positions.
        k_max: Most positions.
        delta: Positions added while the target accepts all that is generated.
        rho: Weight of the newest step in the averages.
    """

    k_min: int = 20
    k_max: int = 30
    delta: int = 10
    rho: float = 0.5
    _generated: float | None = field(default=None, init=False)
    _accepted: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.k_min <= self.k_max:
            raise ZerodraftError(f"k_min={self.k_min}, k_max={self.k_max}: give 1 <= k_min <= k_max.")
        if not 0 < self.rho <= 1:
            raise ZerodraftError(f"rho={self.rho} is out of range; give a number above 0 and at most 1.")

    def fresh(self, costs: Costs) -> "AdaptiveLength":
        return replace(self)

    def next_length(self) -> int:
        if self._generated is None:
            return self.k_min
        more = self.delta if self._accepted >= self._generated else 0
        return min(max(int(self._generated) + more, self.k_min), self.k_max)

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        if self._generated is None:
            self._generated, self._accepted = float(generated), float(accepted)
        else:
            self._generated += self.rho * (generated - self._generated)
            self._accepted += self.rho * (accepted - self._accepted)

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        """All."""
        return len(chances)


@dataclass(slots=True)
class Acceptance:
    """How often each position was accepted when all before it were: counts that fade by `keep` with each step."""

    size: int
    keep: float
    hits: Float64[np.ndarray, " k"] = field(init=False)
    tries: Float64[np.ndarray, " k"] = field(init=False)

    def __post_init__(self) -> None:
        self.hits = np.zeros(self.size)
        self.tries = np.zeros(self.size)

    def update(self, drafted: int, accepted: int) -> None:
        self.hits *= self.keep
        self.tries *= self.keep
        self.hits[:accepted] += 1
        self.tries[: min(drafted, accepted + 1)] += 1

    def rates(self, prior: Float64[np.ndarray, " k"] | float, weight: float) -> Float64[np.ndarray, " k"]:
        """The rates, with the prior counting as much as `weight` tries."""
        return (self.hits + weight * prior) / (self.tries + weight)


@dataclass(kw_only=True, slots=True)
class CostAwareLength:
    """The k with the most expected tokens per second, `(1 + sum_i prod_{j<=i} a_j) / seconds(k)`.

    a_j, the chance that position j is accepted after all before it were, comes from the row's own steps, on a prior of
    all rows' steps, on a prior of all positions. Lengths that are powers of two are tried now and then, so that costs
    and chances stay known for lengths that are not the choice of the day.

    Attributes:
        k_min: Fewest positions.
        k_max: Most positions.
        keep: Factor by which old statistics fade with each step of their row.
        costs: What steps cost.
    """

    k_min: int = 1
    k_max: int = 32
    keep: float = 0.97
    costs: Costs = field(default_factory=Costs)
    _all: Acceptance = field(init=False)
    _row: Acceptance = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.k_min <= self.k_max:
            raise ZerodraftError(f"k_min={self.k_min}, k_max={self.k_max}: give 1 <= k_min <= k_max.")
        if not 0 < self.keep <= 1:
            raise ZerodraftError(f"keep={self.keep} is out of range; give a number above 0 and at most 1.")
        self._all = Acceptance(self.k_max, keep=0.998)
        self._row = Acceptance(self.k_max, self.keep)

    def fresh(self, costs: Costs) -> "CostAwareLength":
        other = replace(self, costs=costs)
        other._all = self._all
        return other

    def best_length(self) -> int:
        """The k that promises the most tokens per second, exploration aside."""
        pooled = (self._all.hits.sum() + 1) / (self._all.tries.sum() + 2)
        rates = self._row.rates(self._all.rates(pooled, weight=4), weight=4)
        tokens = np.concatenate([[1.0], 1 + rates.cumprod().cumsum()])
        promise = tokens / self.costs.curve(self.k_max, "draft", "verify")
        return self.k_min + int(promise[self.k_min :].argmax())

    def next_length(self) -> int:
        grid = [k for k in sorted({self.k_max, *(1 << i for i in range(6))}) if self.k_min <= k <= self.k_max]
        # long drafts first: they say something about every position
        if (untried := self.costs.untried("verify", grid)) is not None:
            return untried
        best, trial = self.best_length(), self.costs.trial("size")
        near = [k for k in grid if k != best and k <= 2 * best + 4] if trial else []
        return near[trial % len(near)] if near else best

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        self._row.update(drafted, accepted)
        self._all.update(drafted, accepted)

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        """All: the length is what this one decides."""
        return len(chances)


@dataclass(slots=True)
class Promises:
    """What drafts promised and what came of them: sums that fade by `keep` with each draft."""

    keep: float
    hoped: float = 0.0
    accepted: float = 0.0

    def update(self, hoped: float, accepted: int) -> None:
        self.hoped = self.hoped * self.keep + hoped
        self.accepted = self.accepted * self.keep + accepted

    def scale(self) -> float:
        """Accepted tokens for each one promised, on a prior of 4 promises kept."""
        return (self.accepted + 4) / (self.hoped + 4)


@dataclass(kw_only=True, slots=True)
class CostAwareTree:
    """Always k positions; of the tree that grows from them, the n likeliest nodes with the most expected tokens per
    second, `(1 + sum_{i<n} chance_i) / seconds(n)`.

    Chances are the drafter's own, scaled by what lately became of such promises. The promise hardly changes around its
    best, and costs are known to a few percent only: of the numbers that come close to the best the largest is taken,
    as a pass more costs more than a node more.

    Attributes:
        k: Positions asked for.
        slack: How close to the best a promise must come, as a share of it.
        keep: Factor by which old promises fade with each draft.
        costs: What steps cost.
    """

    k: int = 8
    slack: float = 0.03
    keep: float = 0.98
    costs: Costs = field(default_factory=Costs)
    _promises: Promises = field(init=False)
    _hoped: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ZerodraftError(f"k={self.k} drafts nothing; give at least 1.")
        if not 0 <= self.slack < 1:
            raise ZerodraftError(f"slack={self.slack} is out of range; give a number of at least 0 and below 1.")
        if not 0 < self.keep <= 1:
            raise ZerodraftError(f"keep={self.keep} is out of range; give a number above 0 and at most 1.")
        self._promises = Promises(self.keep)

    def fresh(self, costs: Costs) -> "CostAwareTree":
        other = replace(self, costs=costs)
        other._promises = self._promises
        return other

    def next_length(self) -> int:
        self._hoped = 0.0
        return self.k

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        # the whole tree among them, or one slow step of that size would keep it from being tried again
        sizes = [n for n in (1, 3, 7, 15, 31, 63, len(chances)) if 0 < n <= len(chances)]
        if (untried := self.costs.untried("score", sizes)) is not None:
            n = untried
        elif sizes and (trial := self.costs.trial("size")):
            n = sizes[trial % len(sizes)]
        else:
            seconds = self.costs.curve(len(chances), "score") + self.costs.at(self.k, "draft")
            promise = self._tokens(chances) / seconds
            # one at least: what is drafted is verified, or nothing would be learnt from it
            n = max(int(np.flatnonzero(promise >= (1 - self.slack) * promise.max())[-1]), min(1, len(chances)))
        self._hoped = float(chances[:n].sum())
        return n

    def _tokens(self, chances: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " sizes"]:
        return 1 + self._promises.scale() * np.concatenate([[0.0], chances.cumsum()])

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        self._promises.update(self._hoped, accepted)
