"""The arithmetic of evidence: means and their intervals over paired seeds, phi, and what an interval says of a claim.

phi: r cycles of a shared block are worth r ** phi copies of it (arXiv 2604.21106). What a looped model is worth is read
off two measured ones: the vanilla model, with one copy, and the one with all r copies stored. Between them the loss is
taken to be linear in the logarithm of the parameters in layers.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from zerodraft.ztt.compare import Interval

Verdict = Literal["not tested yet", "holds", "does not hold", "undecided"]

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""97.5% quantile of Student's t for 1, 2, ... degrees of freedom; for more the last one, which is a little too wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with its 95% t-interval, which is infinitely wide where there is one seed."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of some values with its interval; None of no values."""
    if not values:
        return None
    mean, half = fmean(values), math.inf
    if len(values) > 1:
        half = T_975[min(len(values) - 1, len(T_975)) - 1] * stdev(values) / math.sqrt(len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half, count=len(values))


def paired(of: Mapping[int, float], over: Mapping[int, float]) -> Estimate | None:
    """`of` minus `over`, over the seeds that both have."""
    return estimate([value - over[seed] for seed, value in of.items() if seed in over])


def verdict(difference: Estimate | Interval | None) -> Verdict:
    """What a difference of losses says about the claim that it is below zero."""
    if difference is None:
        return "not tested yet"
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.high < 0:
        return "holds"
    return "does not hold" if difference.low > 0 else "undecided"


def phi(*, loss: float, vanilla: float, unshared: float, copies: int, once: int, shared: int) -> float | None:
    """How many copies of its shared block a looped model is worth, as the exponent of its number of cycles.

    Args:
        loss: Of the looped model.
        vanilla: Of the model with one copy of the block.
        unshared: Of the model that stores as many copies as there are cycles.
        copies: Cycles, at least 2.
        once: Parameters of the layers that are not in the block.
        shared: Parameters of the block.

    Returns:
        None where nothing can be read off: stored copies did not help, or the looped model is worth no copy at all.
    """
    if unshared >= vanilla:
        return None
    share = (vanilla - loss) / (vanilla - unshared)
    one, all_of_them = once + shared, once + copies * shared
    # losses that are all but equal ask for any number of copies
    growth = min(share * math.log(all_of_them / one), 50.0)
    worth = (one * math.exp(growth) - once) / shared
    return math.log(worth) / math.log(copies) if worth > 0 else None


def size_of_equal(loss: float, sizes: Mapping[int, float]) -> float | None:
    """How many parameters a model of another kind would need for a loss.

    Args:
        loss: To be reached.
        sizes: Losses of that kind by parameters; between two neighbours the loss is taken to be linear in the logarithm
            of the parameters.

    Returns:
        None where no two neighbours have the loss between them.
    """
    points = sorted(sizes.items())
    for (small, above), (large, below) in itertools.pairwise(points):
        if above >= loss >= below and above > below:
            return small * (large / small) ** ((above - loss) / (above - below))
    return None
