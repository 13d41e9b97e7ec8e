"""The clocks around a step: who learns what, and that a rest is not timed."""

from itertools import count
from typing import Any

import pytest
import torch

from zerodraft.decoding.fallback import RECENT, UNLIMITED, Fallback
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.stats import DecodeStats, RowStep, Step
from zerodraft.decoding.watch import Watch

CPU = torch.device("cpu")
STEP = Step([RowStep([7, 8], [-1, 0], [0], [7, 9], 9), None])
"""Two tokens for the only row that goes on."""


class Told(FixedLength):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__(3)
        self.costs: list[tuple[str, int, float]] = []

    def observe_cost(self, kind: Any, k: int, seconds: float) -> None:
        self.costs.append((kind, k, seconds))


class Ticking(Fallback):
    """Every look at its clock is a second later; notes what it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = count()
        self.clock = lambda: float(next(self.looks))
        self.learnt: list[tuple[Any, ...]] = []

    def learn(self, *args: Any) -> None:
        self.learnt.append(args)
        super().learn(*args)


def one_step(watch: Watch, positions: int) -> None:
    watch.begin()
    if positions:
        with watch.drafting(positions):
            pass
    watch.drafted(positions)
    watch.verified(positions, 5 if positions else 0)
    watch.count(STEP, [2, 0], draft=True)
    watch.learn(STEP, positions, 4)


def watch_of(fallback: Fallback | None) -> tuple[Watch, Told]:
    length = Told()
    return Watch(DecodeStats(2, 10), length, fallback, CPU), length


def test_costs_and_the_step_are_told() -> None:
    fallback = Ticking()
    watch, length = watch_of(fallback)
    one_step(watch, 3)
    # begins at 0, drafts from 1 to 2, is scored from 3 to 4 and over at 5
    assert length.costs == [("draft", 3, 1.0), ("verify", 3, 1.0), ("score", 5, 1.0)]
    assert fallback.learnt == [(3, 2.0, 5.0, 4)]
    assert (watch.stats.plain_steps, watch.stats.steps, watch.stats.new_tokens) == (0, 1, 2)
    assert watch.stats.seconds["draft"] > 0


def test_a_rest_is_not_timed() -> None:
    fallback = Ticking()
    watch, length = watch_of(fallback)
    fallback._rest = RECENT + 1
    assert watch.longest() == 0
    one_step(watch, 0)
    assert next(fallback.looks) == 0
    assert (length.costs, fallback.learnt) == ([], [(0, 2.0, None, 4)])
    assert watch.stats.plain_steps == 1


@pytest.mark.parametrize("positions", [0, 3])
def test_without_a_fallback_every_step_drafts_and_is_timed(positions: int) -> None:
    watch, length = watch_of(None)
    assert watch.longest() == UNLIMITED
    one_step(watch, positions)
    assert [what for what, *_ in length.costs] == ["draft"] * bool(positions) + ["verify", "score"]
    assert watch.stats.plain_steps == (positions == 0)
