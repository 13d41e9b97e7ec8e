"""Losses over cycles: weights, and draws that depend on nothing but seed and step."""

import pytest
import torch

from zerodraft.errors import ZerodraftError
from zerodraft.training.losses import CycleLoss, weights_over_cycles
from zerodraft.training.recipe import LossRecipe


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("uniform", (1 / 3, 1 / 3, 1 / 3)), ("linear", (1 / 6, 2 / 6, 3 / 6)), ((1.0, 1.0, 2.0), (0.25, 0.25, 0.5))],
)
def test_weights(weights, expected):
    assert weights_over_cycles(weights, 3) == pytest.approx(expected)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.0, 0.0, 0.0), (-1.0, 1.0, 1.0)])
def test_wrong_weights(weights):
    with pytest.raises(ZerodraftError, match=r"loss\.weights"):
        weights_over_cycles(weights, 3)


def test_last_and_plain_need_no_arguments():
    assert CycleLoss(LossRecipe(kind="last"), 3, 0).forward_arguments(5, 0, (2, 4)) == {}
    assert CycleLoss(LossRecipe(kind="sampled"), 1, 0).forward_arguments(5, 0, (2, 4)) == {}


def test_weighted():
    loss = CycleLoss(LossRecipe(kind="weighted", weights=(1.0, 3.0)), 2, 0)
    assert loss.forward_arguments(0, 0, (2, 4)) == {"cycle_weights": (0.25, 0.75)}


def test_sampled_cycles_are_a_function_of_seed_and_step():
    first, again = (CycleLoss(LossRecipe(kind="sampled"), 3, 7) for _ in range(2))
    drawn = [first.forward_arguments(step, 0, (2, 4))["cycles"] for step in range(300)]
    # read in another order, as a resumed run does
    assert [again.forward_arguments(step, 0, (2, 4), rank=1)["cycles"] for step in reversed(range(300))] == drawn[::-1]
    counts = [drawn.count(cycle) for cycle in (1, 2, 3)]
    assert sum((n - 100) ** 2 / 100 for n in counts) < 13.8  # chi-square, 2 degrees of freedom, p = 0.001
    other = CycleLoss(LossRecipe(kind="sampled"), 3, 8)
    assert [other.forward_arguments(step, 0, (2, 4))["cycles"] for step in range(300)] != drawn


def test_token_depths():
    loss = CycleLoss(LossRecipe(kind="sampled", weights=(0.0, 1.0, 1.0), token_depths=1.0), 3, 0)
    depth = loss.forward_arguments(3, 1, (4, 8))["exit_depth"]
    assert depth.shape == (4, 8)
    assert set(depth.unique().tolist()) == {2, 3}
    assert torch.equal(depth, loss.forward_arguments(3, 1, (4, 8))["exit_depth"])
    assert not torch.equal(depth, loss.forward_arguments(3, 1, (4, 8), rank=1)["exit_depth"])


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
