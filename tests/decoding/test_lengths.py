"""Draft lengths: the published rule against a trace worked out by hand and its formula; the cost-aware one finds the
best length of a simulated machine."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.costs import OFTEN, Arm, Costs
from zerodraft.decoding.lengths import (
    Acceptance,
    AdaptiveLength,
    CostAwareLength,
    CostAwareTree,
    DraftLength,
    FixedLength,
)


def spend(costs: Costs, **kinds: tuple[int, float]) -> None:
    """What the policy tells of a step."""
    for kind, (k, seconds) in kinds.items():
        costs.observe(kind, k, seconds)  # type: ignore[arg-type]  # a kind
    costs.steps += 1


@pytest.mark.parametrize("length", [FixedLength(4), AdaptiveLength(), CostAwareLength(), CostAwareTree()])
def test_all_follow_the_protocol(length: DraftLength) -> None:
    assert isinstance(length, DraftLength)
    costs = Costs()
    row = length.fresh(costs)
    for _ in range(3):
        k = row.next_length()
        assert k >= 0
        nodes = row.worth(np.array([0.5, 0.4, 0.1]))
        assert 0 <= nodes <= 3
        spend(costs, draft=(k, 0.001), verify=(k, 0.01), score=(nodes, 0.01))
        row.update(k, k, k // 2)


def test_the_published_rule_by_hand() -> None:
    length = AdaptiveLength()
    assert length.next_length() == 20
    length.update(20, 20, 20)  # averages 20 and 20: the target keeps up
    assert length.next_length() == 30
    length.update(30, 30, 3)  # 25 and 11.5
    assert length.next_length() == 25
    length.update(25, 4, 4)  # 14.5 and 7.75
    assert length.next_length() == 20
    length.update(20, 20, 20)  # 17.25 and 13.875
    length.update(20, 16, 20)  # 16.625 and 16.9375
    assert length.next_length() == 26


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=20),
    k_min=st.integers(1, 10),
    width=st.integers(0, 20),
    delta=st.integers(0, 12),
    rho=st.sampled_from([0.25, 0.5, 1.0]),
)
def test_the_published_rule_is_its_formula(
    steps: list[tuple[int, int]], k_min: int, width: int, delta: int, rho: float
) -> None:
    length = AdaptiveLength(k_min=k_min, k_max=k_min + width, delta=delta, rho=rho)
    ema_g, ema_a = map(float, steps[0])
    length.update(30, *steps[0])
    for generated, accepted in steps[1:]:
        ema_g = (1 - rho) * ema_g + rho * generated
        ema_a = (1 - rho) * ema_a + rho * accepted
        length.update(30, generated, accepted)
    k = np.floor(ema_g) + delta * (ema_a >= ema_g)
    assert length.next_length() == np.clip(k, k_min, k_min + width)


def test_rows_learn_apart_and_share_costs() -> None:
    first = AdaptiveLength()
    first.update(20, 20, 20)
    assert (first.next_length(), first.fresh(Costs()).next_length()) == (30, 20)

    parent, costs = CostAwareLength(k_max=8), Costs()
    one, two = parent.fresh(costs), parent.fresh(costs)
    costs.observe("verify", 8, 1.0)
    costs.observe("verify", 0, 0.5)
    for _ in range(20):
        one.update(8, 8, 0)
        two.update(8, 8, 8)
    assert one.best_length() < two.best_length() == 8


def simulate(
    length: CostAwareLength, rates: np.ndarray, seconds: np.ndarray, steps: int, seed: int = 0
) -> tuple[list[int], float]:
    """The lengths chosen, and the tokens per second, on a machine with these chances and costs."""
    rng = np.random.default_rng(seed)
    chosen, tokens, spent = [], 0, 0.0
    for _ in range(steps):
        k = length.next_length()
        accepted = int((rng.random(k) < rates[:k]).cumprod().sum())
        # now and then the machine is busy with something else
        busy = 5 if rng.random() < 0.05 else 1
        spend(length.costs, draft=(k, 0.1 * seconds[k]), verify=(k, 0.9 * seconds[k] * busy))
        length.update(k, k, accepted)
        chosen.append(k)
        tokens += accepted + 1
        spent += seconds[k]
    return chosen, tokens / spent


def promise(rates: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    return np.concatenate([[1.0], 1 + rates.cumprod().cumsum()]) / seconds


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("slope", [0.002, 0.05, 0.5])
def test_it_finds_nearly_the_best_length(rate: float, slope: float) -> None:
    rates = np.full(16, rate)
    seconds = 0.05 * (1 + slope * np.arange(17))
    length = CostAwareLength(k_max=16)
    simulate(length, rates, seconds, 300)
    # whether to draft at all is not its decision
    best = promise(rates, seconds)[1:]
    assert best[length.best_length() - 1] >= 0.93 * best.max()
    _, speed = simulate(length.fresh(length.costs), rates, seconds, 400, seed=1)
    assert speed >= 0.9 * best.max()


def test_the_shortest_drafts_where_drafting_never_pays_and_back_again() -> None:
    seconds = 0.05 * (1 + 0.3 * np.arange(9))
    length = CostAwareLength(k_max=8, costs=Costs(explore=8))
    chosen, _ = simulate(length, np.zeros(8), seconds, 200)
    assert np.mean(np.array(chosen[50:]) == 1) > 0.8
    chosen, _ = simulate(length, np.full(8, 0.97), seconds, 600)
    assert np.mean(np.array(chosen[-100:]) >= 4) > 0.8


def test_a_cost_that_jumps_is_seen() -> None:
    # a kernel that suddenly needs a second block above 4 rows
    seconds = np.where(np.arange(17) <= 4, 0.02, 0.1)
    length = CostAwareLength(k_max=16)
    simulate(length, np.full(16, 0.7), seconds, 200)
    assert length.best_length() == 4


def test_every_length_of_the_grid_gets_measured() -> None:
    length = CostAwareLength(k_min=2, k_max=20)
    chosen, _ = simulate(length, np.full(20, 0.5), np.full(21, 0.05), 40)
    assert {2, 4, 8, 16, 20} <= set(chosen)
    assert min(chosen) >= 2
    assert max(chosen) <= 20


def test_cost_curve() -> None:
    costs = Costs()
    assert (np.diff(costs.curve(4, "draft", "verify")) > 0).all()
    for seconds in (1.0, 9.0, 1.0):  # the first is an outlier
        costs.observe("verify", 0, seconds)
    costs.observe("verify", 4, 3.0)
    costs.observe("draft", 4, 0.5)
    np.testing.assert_allclose(costs.curve(6, "draft", "verify"), [1.5, 2, 2.5, 3, 3.5, 4.01, 4.52])
    costs.observe("verify", 2, 0.1)  # noise: a longer step is never cheaper
    assert (np.diff(costs.curve(6, "draft", "verify")) >= 0).all()


def test_acceptance_counts_what_was_tried() -> None:
    stats = Acceptance(4, keep=1.0)
    stats.update(drafted=3, accepted=1)
    stats.update(drafted=2, accepted=2)
    assert stats.hits.tolist() == [2, 1, 0, 0]
    assert stats.tries.tolist() == [2, 2, 0, 0]
    np.testing.assert_allclose(stats.rates(0.5, weight=2), [3 / 4, 2 / 4, 0.5, 0.5])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FixedLength(-1), "k=-1"),
        (lambda: AdaptiveLength(k_min=9, k_max=8), "k_min=9"),
        (lambda: AdaptiveLength(rho=0.0), "rho=0"),
        (lambda: CostAwareLength(k_min=3, k_max=2), "k_max=2"),
        (lambda: CostAwareLength(k_min=0), "k_min=0"),
        (lambda: Costs(explore=1), "explore=1"),
        (lambda: CostAwareLength(keep=1.5), "keep=1.5"),
    ],
)
def test_bad_settings_are_named(make: object, named: str) -> None:
    with pytest.raises(ZerodraftError, match=named):
        make()  # type: ignore[operator]  # each is a constructor call


def grow(
    length: CostAwareTree, chances: np.ndarray, seconds: np.ndarray, steps: int, honest: float = 1.0, seed: int = 0
) -> tuple[list[int], float]:
    """The sizes chosen, and the tokens per second, where nodes are accepted with these chances times `honest`, scoring
    n of them takes `seconds[n]`, and a draft a tenth of a plain step."""
    rng = np.random.default_rng(seed)
    sizes, tokens, spent = [], 0, 0.0
    for _ in range(steps):
        k = length.next_length()
        n = length.worth(chances)
        accepted = int((rng.random() < honest * chances[:n]).sum())
        busy = 5 if rng.random() < 0.05 else 1
        spend(length.costs, draft=(k, seconds[0] / 10), score=(n, seconds[n] * busy))
        length.update(k, k, accepted)
        sizes.append(n)
        tokens += accepted + 1
        spent += seconds[n] + seconds[0] / 10
    return sizes, tokens / spent


@pytest.mark.parametrize("first", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("slope", [0.002, 0.05, 0.2])
def test_trees_have_nearly_the_best_size(first: float, slope: float) -> None:
    chances = first ** np.arange(1, 17)
    seconds = 0.05 * (1 + slope * np.arange(17))
    tokens = 1 + np.concatenate([[0], chances.cumsum()])
    best = max((tokens / (seconds + seconds[0] / 10)).max(), 1 / seconds[0])
    speeds = []
    for seed in range(8):
        tree = CostAwareTree()
        grow(tree, chances, seconds, 300, seed=seed)
        speeds.append(grow(tree.fresh(tree.costs), chances, seconds, 600, seed=seed)[1])
    assert np.mean(speeds) >= 0.93 * best


def test_trees_of_a_drafter_that_boasts_are_small() -> None:
    chances, seconds = np.linspace(0.9, 0.5, 12), 0.05 * (1 + 0.1 * np.arange(13))
    sizes, _ = grow(CostAwareTree(), chances, seconds, 600)
    assert np.median(sizes[300:]) == 12
    for honest in (0.05, 0.0):
        tree = CostAwareTree()
        sizes, _ = grow(tree, chances, seconds, 600, honest=honest)
        assert np.median(sizes[300:]) <= 4
        assert np.mean(np.array(sizes[300:]) <= 7) > 0.9
    sizes, _ = grow(tree, chances, seconds, 3000)  # and back again
    assert np.median(sizes[-300:]) == 12


def test_a_tree_of_nothing_is_bad() -> None:
    for bad in ({"k": 0}, {"keep": 0.0}):
        with pytest.raises(ZerodraftError, match=next(iter(bad))):
            CostAwareTree(**bad)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_rows_of_a_batch_try_the_same_in_the_same_step(rows: int) -> None:
    chances, costs = 0.7 ** np.arange(1, 13), Costs(explore=8)
    parent = CostAwareTree(k=4)
    trees = [parent.fresh(costs) for _ in range(rows)]
    for _ in range(160):
        sizes = {tree.worth(chances) for tree in trees if tree.next_length()}
        assert len(sizes) == 1
        nodes = sizes.pop()
        spend(costs, draft=(4, 0.005), verify=(4, 0.1), score=(nodes, 0.05 * (1 + 0.01 * nodes)))
        for tree in trees:
            tree.update(4, 4, 2)
    assert {1, 3, 7, 12} <= set(costs._typical["score"])


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_all_lengths_are_measured_in_a_batch(rows: int) -> None:
    parent, costs = CostAwareLength(k_max=16), Costs()
    lengths = [parent.fresh(costs) for _ in range(rows)]
    for _ in range(40):
        asked = [length.next_length() for length in lengths]
        spend(costs, verify=(max(asked), 0.05))
        for length, k in zip(lengths, asked, strict=True):
            length.update(k, k, k // 2)
    assert {1, 2, 4, 8, 16} <= set(costs._typical["verify"])


def test_trials_take_turns_and_become_rarer() -> None:
    costs = Costs(explore=4)
    tried = {}
    while costs.steps < 4 * 100:
        arms = [(arm, number) for arm in get_args(Arm) if (number := costs.trial(arm))]
        assert len(arms) <= 1
        if arms:
            tried[costs.steps] = arms[0]
        costs.steps += 1
    numbers = [(arm, number) for number in range(1, 9) for arm in ("plain", "size", "copies")]
    assert list(tried.values()) == numbers[: len(tried)]
    assert np.diff(list(tried)).tolist() == [4] * (OFTEN - 1) + [4 * OFTEN] * (len(tried) - OFTEN)
    assert len(tried) > 2 * OFTEN
