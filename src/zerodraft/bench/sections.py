"""What a kernel benchmark consists of: sections, each a sweep over one setting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zerodraft.bench.measure import Case, interleave, ratio, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: Runs of each case.
        quick: Fewer points, too.
    """

    repeats: int
    quick: bool = False

    @property
    def many(self) -> int:
        """Runs of what takes less than a millisecond."""
        return self.repeats * (1 if self.quick else 10)

    def pick(self, values: Sequence[int]) -> list[int]:
        """The points of a sweep; of a quick one the first, a middle one and none of the most expensive."""
        return list(values[:: max(len(values) // 2, 1)][:2] if self.quick else values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A sweep: `x` is the setting that the figure shows."""

    title: str
    about: str
    x: str
    x_label: str
    points: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: getattr(self, name) for name in ("title", "about", "x", "x_label", "points")}


def point(
    at: dict[str, Any], cases: dict[str, Case], repeats: int, *, over: tuple[str, str] | None = None, **figures: float
) -> dict[str, Any]:
    """Milliseconds of all cases at one setting, run in turn.

    Args:
        at: The setting.
        cases: What to time, by name.
        repeats: Runs of each.
        over: Two cases whose ratio is a figure of its own: how many times the second's time the first takes.
        figures: Other figures of this point.
    """
    seconds = interleave(cases, repeats=repeats, warmup=2)
    found: dict[str, Any] = dict(figures)
    if over is not None and set(over) <= set(cases):
        found[f"{over[0]} / {over[1]}"] = ratio(seconds[over[0]], seconds[over[1]])["median"]
    milliseconds = {name: spread([1e3 * s for s in values]) for name, values in seconds.items()}
    return {"at": at, "milliseconds": milliseconds, "figures": found}
