"""Whether an exit rule pays: its loss beside that of fixed depths on the same blocks of text, with intervals.

Every block is read by both, so the differences are paired; an interval is a bootstrap over the blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor

from zerodraft.ztt.tradeoff import Point, Ruler

DRAWS = 2000
"""Samples of the blocks."""

COVERAGE = 0.95
"""Share of the samples that an interval holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over blocks, and where it lies in most samples of them; with one block nothing is known."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if self.low is None else f" [{self.low:+.4f}, {self.high:+.4f}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A rule beside one depth for all tokens.

    Attributes:
        cycles: The depth.
        flops: What it costs, as a share of the FLOPs without exits.
        loss: Its loss.
        difference: Loss of the rule minus that of the depth.
        does_as_well: It costs no more than the rule, and nothing shows that its loss is higher.
    """

    cycles: int
    flops: float
    loss: float
    difference: Interval
    does_as_well: bool


def interval(values: Float[Tensor, " rows"], seed: int = 0) -> Interval:
    """The mean of values, one a block, and its bootstrap interval; a function of its arguments alone."""
    numbers = values.double().cpu().numpy()
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean=mean, low=None, high=None)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(DRAWS, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(axis=1), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]).tolist()
    return Interval(mean=mean, low=low, high=high)


def increase(ruler: Ruler, point: Point) -> Interval:
    """How much a measured point loses against the model without exits."""
    return interval(ruler.losses(point) - ruler.losses(ruler.full))


def compare(ruler: Ruler, point: Point, fixed: Sequence[Point]) -> list[Comparison]:
    """A measured point beside each fixed depth, 1 to N, that was measured with the same ruler."""
    compared = []
    for cycles, depth in enumerate(fixed, 1):
        difference = interval(ruler.losses(point) - ruler.losses(depth))
        worse = difference.mean < 0 if difference.high is None else difference.high < 0
        compared.append(
            Comparison(
                cycles=cycles,
                flops=depth.flops,
                loss=depth.loss,
                difference=difference,
                does_as_well=depth.flops <= point.flops and not worse,
            )
        )
    return compared


def verdict(point: Point, best: Comparison | None) -> str:
    """In words: a measured point beside the best of the fixed depths that meet the same target, if there is one."""
    if best is None:
        return "No fixed depth meets the target."
    text = (
        f"Best fixed depth: cycles:{best.cycles} at {best.flops:.1%} of the FLOPs; the rule at {point.flops:.1%} has a "
        f"loss that differs by {best.difference}. "
    )
    if best.does_as_well:
        return text + f"The fixed depth does as well: --exit-rule cycles:{best.cycles} needs no rule."
    low = best.difference.mean if best.difference.low is None else best.difference.low
    if low > 0:
        return text + "The rule saves compute and costs loss."
    return text + "The rule pays."


def best_line(fixed: Sequence[Point]) -> list[Point]:
    """The corners of the lower convex hull of loss over FLOPs, from the cheapest depth to that of the lowest loss."""
    line: list[Point] = []
    for point in sorted(fixed, key=lambda point: point.flops):
        while len(line) > 1 and _is_above(line[-1], line[-2], point):
            line.pop()
        line.append(point)
    lowest = min(range(len(line)), key=lambda at: line[at].loss)
    return line[: lowest + 1]


def _is_above(point: Point, left: Point, right: Point) -> bool:
    share = (point.flops - left.flops) / (right.flops - left.flops)
    return point.loss >= (1 - share) * left.loss + share * right.loss


def on_line(line: Sequence[Point], flops: float) -> tuple[Point, Point, float]:
    """The points of a line in ascending order that lie on both sides of a cost, and the share of the second; beyond an
    end it is the end itself."""
    if flops <= line[0].flops:
        return line[0], line[0], 0.0
    for left, right in pairwise(line):
        if flops < right.flops:
            return left, right, (flops - left.flops) / (right.flops - left.flops)
    return line[-1], line[-1], 0.0
