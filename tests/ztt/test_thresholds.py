"""Thresholds for each cycle against enumeration of all of them, and what cuts promise against what the model does."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.ztt.tiny import tiny, tokens
from zerodraft import EntropyExit, LatentExit
from zerodraft.ztt.exits import ScoredRule
from zerodraft.ztt.placing import Placing
from zerodraft.ztt.thresholds import Cuts, Outcomes
from zerodraft.ztt.tradeoff import Ruler, fixed_depths


def outcomes(rows: int, cycles: int, seed: int, asking: float = 0.0) -> Outcomes:
    """Losses that fall with the depth and differ between tokens, and scores that know something of it, some equal."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 2 * cycles - 1, generator=generator, dtype=torch.float64) / 3
    losses = 3 + noise[:, :cycles] + torch.linspace(0.5, 0, cycles, dtype=torch.float64)
    scores = (losses[:, -1:] - losses[:, :-1] + noise[:, cycles:]).round(decimals=1)
    costs = torch.arange(1, cycles + 1, dtype=torch.float64) / cycles
    return Outcomes(scores=scores, losses=losses, costs=costs, asking=asking)


def every_cut(of: Outcomes) -> list[Cuts]:
    return [*itertools.product(*([None, *column.unique().tolist()] for column in of.scores.T))]


def test_a_total_is_that_of_tokens_one_by_one() -> None:
    of, cuts = outcomes(9, 4, 0, asking=0.1), (0.2, None, 0.0)
    expected = 0.0
    for scores, losses in zip(of.scores.tolist(), of.losses.tolist(), strict=True):
        cost, stop = 0.0, 3
        for cycle, cut in enumerate(cuts):
            cost += 0.1 * (cut is not None)
            if cut is not None and scores[cycle] >= cut:
                stop = cycle
                break
        expected += losses[stop] + 2 * (cost + of.costs[stop].item())
    assert of.total(cuts, 2.0) == pytest.approx(expected / 9)


@pytest.mark.parametrize("asking", [0.0, 0.02])
def test_no_single_cut_can_be_improved(asking: float) -> None:
    of = outcomes(40, 4, 1, asking)
    best = of.best(0.5)
    for cycle, column in enumerate(of.scores.T):
        for cut in (None, *column.unique().tolist()):
            assert of.total(best, 0.5) <= of.total((*best[:cycle], cut, *best[cycle + 1 :]), 0.5) + 1e-9


def test_descents_find_what_enumeration_finds() -> None:
    found = []
    for seed, (cycles, price) in itertools.product(range(12), [(2, 0.3), (3, 0.3), (3, 1.0)]):
        of = outcomes(12, cycles, seed, asking=0.02 * (seed % 2))
        least = min(of.total(cuts, price) for cuts in every_cut(of))
        gap = of.total(of.best(price), price) - least
        assert gap > -1e-9
        assert cycles > 2 or gap < 1e-9, "one threshold is a scan, and exact"
        found.append(gap < 1e-9)
    assert sum(found) >= 0.9 * len(found)


def test_fixed_depths_and_the_ends_of_the_price() -> None:
    of = outcomes(30, 4, 2)
    for depth, cuts in enumerate(of.fixed()):
        assert of.stops(cuts).unique().tolist() == [depth]
    assert of.stops(of.best(1e6)).unique().tolist() == [0]
    price = 0.4
    assert of.total(of.best(price), price) <= min(of.total(cuts, price) for cuts in of.fixed())
    loss, cost = of.oracle(price)
    assert loss + price * cost <= of.total(of.best(price), price)


def test_tokens_without_a_score_go_on_and_equal_scores_go_together() -> None:
    of = outcomes(10, 2, 3)
    of.scores[:5] = -torch.inf
    of.scores[5:] = 0.5
    assert of.stops(of.best(1e6)).tolist() == [1] * 5 + [0] * 5
    of.scores[5:] = -torch.inf
    assert of.best(1e6) == (None,)


@pytest.mark.parametrize("rule", [LatentExit(threshold=0.0), EntropyExit(threshold=0.0)], ids=["latent", "entropy"])
def test_outcomes_are_those_of_the_model(rule: ScoredRule) -> None:
    """With fixed depths nobody's company differs, so losses are exact; scores are those of the right positions."""
    model, ids = tiny("llama"), tokens(8, 6)
    ruler = Ruler(model, ids)
    placing = Placing(ruler, rule, fixed_depths(ruler))
    of = placing.outcomes
    ends = of.scores.view(8, 5, 2)[:, -1]
    assert placing.prices(5) == sorted({*placing.prices(5)})
    for depth, cuts in enumerate(of.fixed(), 1):
        made = replace(rule, threshold=[None if cut is None else rule.sign * cut for cut in cuts])
        point = ruler.measure(made)
        loss, cost = of.loss_and_cost(cuts)
        # the last token of a block predicts nothing, and none of these thresholds were placed for it
        assert point.depths[depth - 1] >= 5 / 6 - 1e-6
        assert point.loss == pytest.approx(loss.mean().item(), abs=1e-5)
        assert point.flops == pytest.approx(cost.mean().item(), abs=0.1)
    with torch.no_grad():
        scored = []
        model(ids[:, :5], exit_rule=lambda out: scored.append(rule.score(out)) or torch.zeros(40, dtype=torch.bool))
    assert torch.stack(scored, 1).view(8, 5, 2)[:, -1].double() == pytest.approx(ends, abs=1e-5)
