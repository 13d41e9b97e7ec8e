"""Where the thresholds of a rule go, from what one text shows: one for all cycles by level, one for each by price."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from zerodraft.ztt.compare import best_line
from zerodraft.ztt.exits import ScoredRule
from zerodraft.ztt.thresholds import Cuts
from zerodraft.ztt.tradeoff import LEVELS, Point, Ruler, at_level


class Placing:
    """Places thresholds of a rule on the text of a ruler.

    Args:
        ruler: Whose text; what they bring is to be measured on another one.
        rule: Its threshold is replaced.
        fixed: The fixed depths, measured with the ruler.

    Raises:
        ZerodraftError: the rule has nothing to look at, or a score is not a number.
    """

    def __init__(self, ruler: Ruler, rule: ScoredRule, fixed: Sequence[Point]) -> None:
        self.rule, self.fixed = rule, fixed
        self.outcomes, self.scores = ruler.outcomes(rule, fixed), ruler.scores(rule)
        self._found: dict[float, Cuts] = {}

    def for_all(self, level: float) -> ScoredRule:
        """One threshold for all cycles, which a share `level` of all scores reaches."""
        return at_level(self.rule, self.scores, level)

    def for_each(self, price: float) -> ScoredRule:
        """A threshold for each cycle: those with the least loss plus `price` times the share of the FLOPs."""
        if price not in self._found:
            self._found[price] = self.outcomes.best(price, [*self._equal, *self._found.values()])
        sign = self.rule.sign
        return replace(self.rule, threshold=[None if cut is None else sign * cut for cut in self._found[price]])

    @cached_property
    def _equal(self) -> list[Cuts]:
        """Cuts that are the same after all cycles."""
        cuts = [self.rule.sign * float(self.for_all(level).threshold_after(1) or 0) for level in LEVELS]
        return [(cut,) * self.outcomes.scores.shape[1] for cut in cuts]

    def prices(self, count: int = len(LEVELS)) -> list[float]:
        """From rare to frequent exits, in nats for all the FLOPs of a token: around the slopes of the line through the
        best fixed depths, where one gives way to the next, and one price at which nothing but compute counts."""
        slopes = [(a.loss - b.loss) / (b.flops - a.flops) for a, b in pairwise(best_line(self.fixed))]
        least, most = (min(slopes), max(slopes)) if slopes else (1e-3, 1.0)
        return [*np.geomspace(least / 4, 4 * most, count - 1).tolist(), 1e3 * most]
