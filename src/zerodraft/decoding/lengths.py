"""How many positions to draft next.

`AdaptiveLength` is the published controller of DiffuSpec (ADL, arXiv 2510.02358): moving averages of what the drafter
fills before its EOS and of what the target accepts. `CostAwareLength` and `CostAwareTree` are ours: they know what a
step costs on this machine, because the engine tells them, and take the length of a path, or of each tree the nodes,
that promise the most tokens per second.

A controller is one row's. `fresh` gives another row, or the next call, its own with the same settings; what was learnt
about costs is shared, and so is the clock by which lengths are tried: a step costs what its longest row makes it cost,
so rows try the same thing in the same step.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from zerodraft.common.errors import ZerodraftError

CostKind = Literal["draft", "verify", "score"]
"""What seconds were spent on: drafting k positions; the rest of a step, by k; and by the nodes that were scored."""


@runtime_checkable
class DraftLength(Protocol):
    """Decides the length of each draft of one row."""

    def fresh(self) -> "DraftLength":
        """A controller for another row or call, with the same settings."""
        ...

    def next_length(self) -> int:
        """Positions to ask the drafter for; 0 means a plain step of the target."""
        ...

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        """Take note of a step: positions asked for, those that the drafter filled before its EOS, and those that the
        target accepted."""
        ...

    def observe_cost(self, kind: CostKind, k: int, seconds: float) -> None:
        """Take note of what a step cost whose row asked for k positions, or (`"score"`) whose draft had k nodes (of a
        batch: the most of any row, told to one of them). Each step has one `"verify"` and one `"score"`."""
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
            raise ZerodraftError(f"k={self.k} is no draft length; give 0 or more.")

    def fresh(self) -> "FixedLength":
        return self

    def next_length(self) -> int:
        return self.k

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        """Nothing to learn."""

    def observe_cost(self, kind: CostKind, k: int, seconds: float) -> None:
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

    def fresh(self) -> "AdaptiveLength":
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

    def observe_cost(self, kind: CostKind, k: int, seconds: float) -> None:
        """The published rule knows no costs."""

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        """All."""
        return len(chances)


@dataclass(slots=True)
class Costs:
    """What steps of k positions cost: the lower quartile of the last few measurements at each k that was tried, since a
    busy machine and the first step of a shape only ever add to a time."""

    _last: dict[tuple[CostKind, int], deque[float]] = field(default_factory=dict)
    _typical: dict[CostKind, dict[int, float]] = field(default_factory=dict)
    _lines: dict[CostKind, "Line"] = field(default_factory=dict)

    def observe(self, kind: CostKind, k: int, seconds: float) -> None:
        last = self._last.setdefault((kind, k), deque(maxlen=9))
        last.append(seconds)
        typical, known = sorted(last)[(len(last) - 1) // 4], self._typical.setdefault(kind, {})
        if known.get(k) != typical:
            known[k] = typical
            self._lines.pop(kind, None)

    def measured(self, kind: CostKind, k: int) -> bool:
        """Whether a step of k positions was ever timed."""
        return k in self._typical.get(kind, {})

    def curve(self, k_max: int, *kinds: CostKind) -> Float64[np.ndarray, " k"]:
        """Seconds for k = 0..k_max, summed over kinds: straight lines between what was measured, never falling."""
        return np.sum([line.upto(k_max) for line in self._drawn(kinds)], 0)

    def at(self, k: int, *kinds: CostKind) -> float:
        """The curve at one k."""
        return sum(line(k) for line in self._drawn(kinds))

    def _drawn(self, kinds: Sequence[CostKind]) -> "list[Line]":
        measured: list[CostKind] = [kind for kind in kinds if kind in self._typical]
        lines = []
        for kind in measured:
            # another thread may take a line away at any moment, or add to what was measured
            if (line := self._lines.get(kind)) is None:
                line = self._lines[kind] = Line.through(sorted(self._typical[kind].copy().items()))
            lines.append(line)
        return lines or [UNKNOWN]


SLOPE = 0.02
"""What one more position is taken to cost, of a whole step, until two lengths were measured."""


class Line(NamedTuple):
    """Seconds of k = 0, 1, ..., and what one more costs beyond the last. Lists, since a few numbers are looked up
    between passes of the target, when numpy is in no cache."""

    seconds: list[float]
    slope: float

    @staticmethod
    def through(points: Sequence[tuple[int, float]]) -> "Line":
        """What was measured, shortest first; fewer positions never cost more."""
        typical = list(accumulate((seconds for _, seconds in reversed(points)), min))[::-1]
        measured = [(k, low) for (k, _), low in zip(points, typical, strict=True)]
        (first, lowest), (last, highest) = measured[0], measured[-1]
        seconds = [lowest] * (first + 1)
        for (k, low), (end, high) in pairwise(measured):
            seconds += [low + (high - low) * (i - k) / (end - k) for i in range(k + 1, end + 1)]
        return Line(seconds, (highest - lowest) / (last - first) if last > first else SLOPE * highest)

    def __call__(self, k: int) -> float:
        beyond = k + 1 - len(self.seconds)
        return self.seconds[k] if beyond <= 0 else self.seconds[-1] + beyond * self.slope

    def upto(self, k: int) -> list[float]:
        """For 0..k."""
        return self.seconds[: k + 1] + [self(at) for at in range(len(self.seconds), k + 1)]


UNKNOWN = Line([1.0], SLOPE)
"""Before anything was measured: a step costs much the same whatever its length."""


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
        k_min: Fewest positions. 0 allows plain steps where drafting does not pay.
        k_max: Most positions.
        explore: One step in so many tries another length.
        keep: Factor by which old statistics fade with each step of their row.
    """

    k_min: int = 0
    k_max: int = 32
    explore: int = 24
    keep: float = 0.97
    _costs: Costs = field(default_factory=Costs, init=False)
    _all: Acceptance = field(init=False)
    _row: Acceptance = field(init=False)
    _clock: list[int] = field(default_factory=lambda: [1], init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.k_min <= self.k_max or not self.k_max:
            raise ZerodraftError(
                f"k_min={self.k_min}, k_max={self.k_max}: give 0 <= k_min <= k_max, and k_max above 0."
            )
        if self.explore < 2:
            raise ZerodraftError(f"explore={self.explore} would never use the best length; give at least 2.")
        if not 0 < self.keep <= 1:
            raise ZerodraftError(f"keep={self.keep} is out of range; give a number above 0 and at most 1.")
        self._all = Acceptance(self.k_max, keep=0.998)
        self._row = Acceptance(self.k_max, self.keep)

    def fresh(self) -> "CostAwareLength":
        other = replace(self)
        other._costs, other._all, other._clock = self._costs, self._all, self._clock
        return other

    def best_length(self) -> int:
        """The k that promises the most tokens per second, exploration aside."""
        pooled = (self._all.hits.sum() + 1) / (self._all.tries.sum() + 2)
        rates = self._row.rates(self._all.rates(pooled, weight=4), weight=4)
        tokens = np.concatenate([[1.0], 1 + rates.cumprod().cumsum()])
        promise = tokens / self._costs.curve(self.k_max, "draft", "verify")
        return self.k_min + int(promise[self.k_min :].argmax())

    def next_length(self) -> int:
        step = self._clock[0]
        grid = [k for k in sorted({self.k_max, *(1 << i for i in range(6)), 0}) if self.k_min <= k <= self.k_max]
        unknown = [k for k in grid if not self._costs.measured("verify", k)]
        # long drafts first: they say something about every position
        if unknown and step % 2:
            return unknown[-1]
        best = self.best_length()
        if step % self.explore:
            return best
        near = [k for k in grid if k != best and k <= 2 * best + 4]
        return near[step // self.explore % len(near)] if near else best

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        self._row.update(drafted, accepted)
        self._all.update(drafted, accepted)

    def observe_cost(self, kind: CostKind, k: int, seconds: float) -> None:
        if kind != "score":
            self._costs.observe(kind, min(k, self.k_max), seconds)
        if kind == "verify":
            self._clock[0] += 1

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        """All: the length is what this one decides."""
        return len(chances)


@dataclass(slots=True)
class Promises:
    """What drafts promised and what came of them: sums that fade by `keep` with each draft."""

    keep: float
    hoped: float = 0.0
    accepted: float = 0.0
    drafts: float = 0.0
    seconds: float = 0.0

    def update(self, hoped: float, accepted: int, seconds: float) -> None:
        for name, new in (("hoped", hoped), ("accepted", accepted), ("drafts", 1), ("seconds", seconds)):
            setattr(self, name, getattr(self, name) * self.keep + new)

    def scale(self) -> float:
        """Accepted tokens for each one promised, on a prior of 4 promises kept."""
        return (self.accepted + 4) / (self.hoped + 4)

    def speed(self) -> float:
        """Tokens per second of steps with a draft."""
        return (self.accepted + self.drafts) / self.seconds if self.seconds else 0.0


OFTEN = 8
"""So many turns hold a trial each, of the later ones one in so many."""


@dataclass(kw_only=True, slots=True)
class CostAwareTree:
    """Always k positions; of the tree that grows from them, the n likeliest nodes with the most expected tokens per
    second, `(1 + sum_{i<n} chance_i) / seconds(n)`.

    Chances are the drafter's own, scaled by what lately became of such promises. The promise hardly changes around its
    best, and costs are known to a few percent only: of the numbers that come close to the best the largest is taken,
    as a pass more costs more than a node more.

    Attributes:
        k: Positions asked for.
        explore: One step in so many scores another number of nodes, and one is plain (with `rest`: not what it would
            be). After the first few trials only one in eight is made, but for drafts while they rest.
        slack: How close to the best a promise must come, as a share of it.
        rest: Plain steps while those with a draft bring fewer tokens per second, where no `Fallback` sees to that. Not
            for a `HybridDrafter`, whose copies cost nothing and which leaves its other drafter out by itself.
        keep: Factor by which old promises fade with each draft.
    """

    k: int = 8
    explore: int = 24
    slack: float = 0.03
    rest: bool = False
    keep: float = 0.98
    _costs: Costs = field(default_factory=Costs, init=False)
    _promises: Promises = field(init=False)
    _clock: list[int] = field(default_factory=lambda: [1], init=False)
    _hoped: float = field(default=0.0, init=False)
    _nodes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ZerodraftError(f"k={self.k} drafts nothing; give at least 1.")
        if self.explore < 2:
            raise ZerodraftError(f"explore={self.explore} would never use the best size; give at least 2.")
        if not 0 <= self.slack < 1:
            raise ZerodraftError(f"slack={self.slack} is out of range; give a number of at least 0 and below 1.")
        if not 0 < self.keep <= 1:
            raise ZerodraftError(f"keep={self.keep} is out of range; give a number above 0 and at most 1.")
        self._promises = Promises(self.keep)

    def fresh(self) -> "CostAwareTree":
        other = replace(self)
        other._costs, other._promises, other._clock = self._costs, self._promises, self._clock
        return other

    def next_length(self) -> int:
        self._hoped, self._nodes = 0.0, 0
        if self.rest and not self.pays():
            return self.k if self._clock[0] % self.explore == 0 else 0
        return 0 if self._trial(0) else self.k

    def pays(self) -> bool:
        """Whether drafts have been worth their time lately."""
        if self._promises.drafts < 8 or not self._costs.measured("score", 0):
            return True
        return bool(self._promises.speed() * self._costs.at(0, "score") > 1)

    def worth(self, chances: Float64[np.ndarray, " n"]) -> int:
        # the whole tree among them, or one slow step of that size would keep it from being tried again
        sizes = [n for n in (1, 3, 7, 15, 31, 63, len(chances)) if 0 < n <= len(chances)]
        unknown = [n for n in sizes if not self._costs.measured("score", n)]
        trial = self._trial(self.explore // 2)
        if unknown and self._clock[0] % 2:
            n = unknown[-1]
        elif sizes and trial:
            n = sizes[trial % len(sizes)]
        else:
            seconds = self._costs.curve(len(chances), "score") + self._costs.at(self.k, "draft")
            promise = self._tokens(chances) / seconds
            # one at least: what is drafted is verified, or nothing would be learnt from it
            n = max(int(np.flatnonzero(promise >= (1 - self.slack) * promise.max())[-1]), min(1, len(chances)))
        self._hoped, self._nodes = float(chances[:n].sum()), n
        return n

    def _trial(self, ahead: int) -> int:
        """The number of the trial that this step is, from 1, or 0 if it is none; a turn's comes `ahead` of its end."""
        turn, rest = divmod(self._clock[0] + ahead, self.explore)
        if rest or (turn > OFTEN and turn % OFTEN):
            return 0
        return turn if turn <= OFTEN else OFTEN - 1 + turn // OFTEN

    def _tokens(self, chances: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " sizes"]:
        return 1 + self._promises.scale() * np.concatenate([[0.0], chances.cumsum()])

    def update(self, drafted: int, generated: int, accepted: int) -> None:
        seconds = self._costs.at(self._nodes, "score") + self._costs.at(self.k, "draft")
        self._promises.update(self._hoped, accepted, seconds)

    def observe_cost(self, kind: CostKind, k: int, seconds: float) -> None:
        if kind != "verify":
            self._costs.observe(kind, k, seconds)
        if kind == "score":
            self._clock[0] += 1
