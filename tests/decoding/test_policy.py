"""The clocks around a step: who learns what, who decides what, and that a rest is not timed."""

from itertools import count
from typing import Any

import pytest
import torch

from tests.decoding.drafters import NoisyDrafter
from zerodraft.decoding.costs import Arm, Costs
from zerodraft.decoding.fallback import RECENT, UNLIMITED, Fallback
from zerodraft.decoding.policy import Policy
from zerodraft.decoding.stats import DecodeStats, RowStep, Step
from zerodraft.drafters.hybrid import HybridDrafter

CPU = torch.device("cpu")
STEP = Step([RowStep([7, 8], [-1, 0], [0], [7, 9], 9), None])
"""Two tokens for the only row that goes on."""


class Ticking(Costs):
    """Every look at its clock is a second later; notes what it observes."""

    def __init__(self, trial: Arm | None = None) -> None:
        super().__init__()
        self.looks = count()
        self.clock = lambda: float(next(self.looks))
        self.told: list[tuple[Any, ...]] = []
        self.tried = trial

    def observe(self, *args: Any) -> None:
        self.told.append(args)

    def trial(self, arm: Arm) -> int:
        return int(arm == self.tried)


class Noting(Fallback):
    """Notes what it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt: list[tuple[Any, ...]] = []

    def learn(self, *args: Any) -> None:
        self.learnt.append(args)
        super().learn(*args)


def one_step(policy: Policy, positions: int) -> int:
    longest = policy.begin()
    if positions:
        with policy.drafting(positions):
            pass
    policy.drafted(positions)
    policy.verified(positions, 5 if positions else 0)
    policy.count(STEP, [2, 0], draft=True)
    policy.learn(STEP, positions, 4)
    return longest


def policy_of(fallback: Fallback | None, trial: Arm | None = None, *, hybrid: bool = False) -> tuple[Policy, Any]:
    costs, drafter = Ticking(trial), NoisyDrafter([[]] * 2, 9)
    session = (HybridDrafter(other=drafter) if hybrid else drafter).start(2, CPU, None)
    return Policy(DecodeStats(2, 10), costs, fallback, Noting(), session, CPU), costs


def test_costs_and_the_step_are_told() -> None:
    fallback = Noting()
    policy, costs = policy_of(fallback)
    one_step(policy, 3)
    # begins at 0, drafts from 1 to 2, is scored from 3 to 4 and over at 5
    assert costs.told == [("draft", 3, 1.0), ("verify", 3, 1.0), ("score", 5, 1.0)]
    assert fallback.learnt == [(3, 2.0, 5.0, 4)]
    assert (policy.stats.plain_steps, policy.stats.steps, policy.stats.new_tokens) == (0, 1, 2)
    assert policy.stats.seconds["draft"] > 0
    assert costs.steps == 2


def test_a_rest_is_not_timed() -> None:
    fallback = Noting()
    policy, costs = policy_of(fallback)
    fallback._rest = RECENT + 1
    assert one_step(policy, 0) == 0
    assert next(costs.looks) == 0
    assert (costs.told, fallback.learnt) == ([], [(0, 2.0, None, 4)])
    assert policy.stats.plain_steps == 1
    assert costs.steps == 1


@pytest.mark.parametrize("positions", [0, 3])
@pytest.mark.parametrize("trial", [None, "plain"])
def test_without_a_fallback_every_step_drafts_and_is_timed(positions: int, trial: Arm | None) -> None:
    policy, costs = policy_of(None, trial)
    assert one_step(policy, positions) == UNLIMITED
    assert [what for what, *_ in costs.told] == ["draft"] * bool(positions) + ["verify", "score"]
    assert policy.stats.plain_steps == (positions == 0)


@pytest.mark.parametrize("trial", [None, "plain", "copies", "size"])
def test_trials_are_of_one_thing(trial: Arm | None) -> None:
    policy, _ = policy_of(Fallback(), trial, hybrid=True)
    assert policy.fallback
    for learner in (policy.fallback, policy.beside):
        for _ in range(2):
            learner.learn(0, 1.0, 1.0)
    assert policy._copying
    assert (policy.begin() > 0, policy._copying.longest > 0) == (trial != "plain", trial != "copies")


def test_the_model_beside_copies_is_judged_by_whole_steps() -> None:
    policy, _ = policy_of(None, hybrid=True)
    beside = policy.beside
    assert isinstance(beside, Noting)
    assert policy._copying
    for asked in (None, 0, None, 2, 1):
        policy.begin()
        policy._copying.asked = asked
        policy.verified(3, 3)
        policy.learn(STEP, 3, 0)
    # a step begins and ends; there were 5 tokens of a prompt and three steps to read, and then one
    assert beside.learnt == [(0, 2.0, 1.0, 7.0), (2, 2.0, 1.0, 11.0), (1, 2.0, 1.0, 2.0)]
