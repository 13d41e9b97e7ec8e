"""What the parts of a step take on this machine, and which steps are there to find out.

One `Costs` serves all calls of a decoder: the policy of the loop (`policy.py`) writes it, draft lengths and the policy
read it. Costs that are not looked at go stale, so now and then a step is a trial of something other than the best: the
trials are counted here, for all who decide, so that they never meet in one step, and so that the rows of a batch, whose
steps cost what the longest row makes them cost, try the same thing in the same step.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from time import perf_counter, thread_time
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float64

from zerodraft.common.errors import ZerodraftError

CostKind = Literal["draft", "verify", "score"]
"""What seconds were spent on: drafting k positions; the rest of a step, by k; and by the nodes that were scored."""
Arm = Literal["plain", "size", "copies"]
"""What is tried, in turn: a plain step, a draft or tree of another size, copies without the drafter's model."""
OFTEN = 8
"""This many trials come one after the other; of the later ones, one in as many is made."""


@dataclass(slots=True)
class Costs:
    """Seconds of steps by their size: the lower quartile of the last few measurements at each k that was tried, since a
    busy machine and the first step of a shape only ever add to a time.

    Attributes:
        explore: Steps from trial to trial; after the first few trials eight times as many.
        clock: Seconds; None: see `timer`.
        steps: The number of the step, from 1; those of a rest do not count.
    """

    explore: int = 48
    clock: Callable[[], float] | None = None
    steps: int = field(default=1, init=False)
    _last: dict[tuple[CostKind, int], deque[float]] = field(default_factory=dict, init=False)
    _typical: dict[CostKind, dict[int, float]] = field(default_factory=dict, init=False)
    _lines: dict[CostKind, "Line"] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.explore < 2:
            raise ZerodraftError(f"explore={self.explore} leaves no steps for the best choice; give at least 2.")

    def timer(self, device: torch.device) -> Callable[[], float]:
        """The clock for steps on a device. On a CPU the time of this thread, which other programs add nothing to: a
        machine that is busy for a moment would make drafts look dear."""
        return self.clock or (thread_time if device.type == "cpu" else perf_counter)

    def trial(self, arm: Arm) -> int:
        """The number of the trial of this arm that the step is, from 1, or 0 if it is none."""
        turn, rest = divmod(self.steps, self.explore)
        if rest or (turn > OFTEN and turn % OFTEN):
            return 0
        turn = turn if turn <= OFTEN else OFTEN - 1 + turn // OFTEN
        number, place = divmod(turn - 1, len(get_args(Arm)))
        return number + 1 if get_args(Arm)[place] == arm else 0

    def observe(self, kind: CostKind, k: int, seconds: float) -> None:
        """Take note of what a step took whose longest row asked for k positions, or whose largest draft had k nodes."""
        last = self._last.setdefault((kind, k), deque(maxlen=9))
        last.append(seconds)
        typical, known = sorted(last)[(len(last) - 1) // 4], self._typical.setdefault(kind, {})
        if known.get(k) != typical:
            known[k] = typical
            self._lines.pop(kind, None)

    def untried(self, kind: CostKind, sizes: Sequence[int]) -> int | None:
        """The largest of these sizes that was never timed, where it is time to try it: in every other step."""
        known = self._typical.get(kind, {})
        return max((k for k in sizes if k not in known), default=None) if self.steps % 2 else None

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
