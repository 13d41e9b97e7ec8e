"""Losses over cycles: weights, and draws that depend on nothing but seed and step."""

import pytest
import torch

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.recipe import LossRecipe
from zerodraft.training.ztt.losses import CycleLoss, weights_over_cycles


def arguments(loss, step=0, micro_step=0, shape=(2, 4), *, rank=0, progress=0.0):
    return loss.forward_arguments(step, micro_step, shape, rank, progress=progress)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("uniform", (1 / 3, 1 / 3, 1 / 3)), ("linear", (1 / 6, 2 / 6, 3 / 6)), ((1.0, 1.0, 2.0), (0.25, 0.25, 0.5))],
)
def test_weights(weights, expected):
    assert weights_over_cycles(weights, 3) == pytest.approx(expected)


@pytest.mark.parametrize(
    "weights", [(1.0, 2.0), (0.0, 0.0, 0.0), (-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (float("inf"), 1.0, 1.0)]
)
def test_wrong_weights(weights):
    with pytest.raises(ZerodraftError, match=r"loss\.weights"):
        weights_over_cycles(weights, 3)


def test_last_and_plain_need_no_arguments():
    assert arguments(CycleLoss(LossRecipe(kind="last"), 3, 0), 5) == {}
    assert arguments(CycleLoss(LossRecipe(kind="sampled"), 1, 0), 5) == {}


def test_weighted():
    loss = CycleLoss(LossRecipe(kind="weighted", weights=(1.0, 3.0)), 2, 0)
    assert arguments(loss) == {"cycle_weights": (0.25, 0.75)}


def test_sampled_cycles_are_a_function_of_seed_and_step():
    first, again = (CycleLoss(LossRecipe(kind="sampled"), 3, 7) for _ in range(2))
    drawn = [arguments(first, step)["cycles"] for step in range(300)]
    # read in another order, as a resumed run does
    assert [arguments(again, step, rank=1)["cycles"] for step in reversed(range(300))] == drawn[::-1]
    counts = [drawn.count(cycle) for cycle in (1, 2, 3)]
    assert sum((n - 100) ** 2 / 100 for n in counts) < 13.8  # chi-square, 2 degrees of freedom, p = 0.001
    other = CycleLoss(LossRecipe(kind="sampled"), 3, 8)
    assert [arguments(other, step)["cycles"] for step in range(300)] != drawn


def test_token_depths():
    loss = CycleLoss(LossRecipe(kind="sampled", weights=(0.0, 1.0, 1.0), token_depths=1.0), 3, 0)
    depth = arguments(loss, 3, 1, (4, 8))["exit_depth"]
    assert depth.shape == (4, 8)
    assert set(depth.unique().tolist()) == {2, 3}
    assert torch.equal(depth, arguments(loss, 3, 1, (4, 8))["exit_depth"])
    assert not torch.equal(depth, arguments(loss, 3, 1, (4, 8), rank=1)["exit_depth"])


OPENING = {"cycles_from": (0.4, 0.65)}


def test_cycles_open_one_after_the_other():
    """At the step that reaches a share exactly, and not one before."""
    loss = CycleLoss(LossRecipe(**OPENING), 3, 0)
    run = [arguments(loss, step, progress=step / 20) for step in range(20)]
    assert run == [{"cycles": 1}] * 8 + [{"cycles": 2}] * 5 + [{}] * 7
    at_once = CycleLoss(LossRecipe(cycles_from=(0.0, 0.5)), 3, 0)
    assert [at_once.open_cycles(progress) for progress in (0, 0.49, 0.5, 1)] == [2, 2, 3, 3]


def test_exits_of_the_open_cycles():
    weighted = CycleLoss(LossRecipe(kind="weighted", weights=(1.0, 1.0, 2.0), **OPENING), 3, 0)
    assert arguments(weighted, progress=0.3) == {"cycles": 1}
    assert arguments(weighted, progress=0.5) == {"cycles": 2, "cycle_weights": (0.25, 0.25)}
    assert arguments(weighted, progress=0.7) == {"cycle_weights": (0.25, 0.25, 0.5)}
    sampled = CycleLoss(LossRecipe(kind="sampled", **OPENING), 3, 0)
    drawn = [arguments(sampled, step, progress=0.5)["cycles"] for step in range(200)]
    assert 60 < drawn.count(1) == 200 - drawn.count(2) < 140
    depths = CycleLoss(LossRecipe(kind="sampled", token_depths=1.0, **OPENING), 3, 0)
    found = arguments(depths, shape=(4, 8), progress=0.5)
    assert found["cycles"] == 2
    assert set(found["exit_depth"].unique().tolist()) == {1, 2}
    # the last of those that are open, where none of them has a weight
    only_last = CycleLoss(LossRecipe(kind="weighted", weights=(0.0, 0.0, 1.0), **OPENING), 3, 0)
    assert arguments(only_last, progress=0.5) == {"cycles": 2}


def test_exits_learn_from_the_last_cycle():
    loss = CycleLoss(LossRecipe(kind="weighted", exits_from=0.5, exit_targets="last"), 2, 0)
    assert arguments(loss, progress=0.4) == {}
    assert arguments(loss, progress=0.6) == {"distil_cycles": True, "cycle_weights": (0.5, 0.5)}


@pytest.mark.parametrize("kind", ["weighted", "sampled"])
def test_exits_begin_late(kind):
    late, early = (CycleLoss(LossRecipe(kind=kind, exits_from=share), 3, 0) for share in (0.8, 0.0))
    for step in range(10):
        expected = {} if step < 8 else arguments(early, step)
        assert arguments(late, step, progress=step / 10) == expected
    both = CycleLoss(LossRecipe(kind=kind, exits_from=0.8, **OPENING), 3, 0)
    assert [arguments(both, progress=progress) for progress in (0.5, 0.7)] == [{"cycles": 2}, {}]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LossRecipe(cycles_from=(0.5,)), r"loss\.cycles_from has 1 numbers, the model has 3 cycles"),
        (LossRecipe(cycles_from=(0.6, 0.5)), r"ascending shares"),
        (LossRecipe(cycles_from=(0.5, 1.0)), r"ascending shares"),
        (LossRecipe(cycles_from=(-0.1, 0.5)), r"ascending shares"),
        (LossRecipe(cycles_from=(0.1, float("nan"))), r"ascending shares"),
        (LossRecipe(exits_from=0.5), r"loss\.exits_from needs loss\.kind 'weighted' or 'sampled'"),
        (LossRecipe(exit_targets="last"), r"loss\.exit_targets 'last' needs loss\.kind 'weighted', got 'last'"),
        (LossRecipe(kind="weighted", exits_from=1.0), r"at least 0 and below 1"),
        (LossRecipe(kind="weighted", exits_from=-0.5), r"at least 0 and below 1"),
    ],
)
def test_wrong_shares(recipe, message):
    with pytest.raises(ZerodraftError, match=message):
        CycleLoss(recipe, 3, 0)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LossRecipe(kind="sampled", token_depths=1.5), "between 0 and 1"),
        (LossRecipe(kind="last", token_depths=0.5), "sampled"),
    ],
)
def test_wrong_token_depths(recipe, message):
    with pytest.raises(ZerodraftError, match=message):
        CycleLoss(recipe, 2, 0)
