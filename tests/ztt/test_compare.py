"""Rules beside fixed depths: paired differences, intervals that hold what they should, and what is said about them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ztt.tiny import tiny, tokens
from zerodraft import FixedExit, LatentExit, ZerodraftError, ZttForCausalLM
from zerodraft.ztt.compare import Comparison, Interval, best_line, compare, increase, interval, on_line, verdict
from zerodraft.ztt.tradeoff import Point, Ruler


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(-3, 3))
def test_an_interval_holds_its_mean_and_moves_with_the_values(values: list[float], shift: float) -> None:
    numbers = torch.tensor(values, dtype=torch.float64)
    found, moved = interval(numbers), interval(numbers + shift)
    assert found == interval(numbers)
    assert found.low is not None
    assert found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert moved.mean == pytest.approx(found.mean + shift, abs=1e-9)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        found = interval(torch.randn(40, generator=generator))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    # 95% of 300 is 285, with a standard deviation of 4; a bootstrap of 40 values is a little narrow
    assert 268 <= held <= 298


def test_one_block_has_no_interval() -> None:
    assert interval(torch.ones(1)) == Interval(mean=1.0, low=None, high=None)
    assert str(Interval(mean=1.0, low=None, high=None)) == "+1.0000"
    assert str(Interval(mean=0.5, low=-0.25, high=1.0)) == "+0.5000 [-0.2500, +1.0000]"


def test_a_rule_that_is_a_fixed_depth_does_not_beat_it() -> None:
    ruler = Ruler(tiny("qwen3"), tokens(6, 16), batch_size=4)
    fixed = [ruler.measure(FixedExit(cycles=cycles)) for cycles in (1, 2, 3)]
    # everybody stops at once
    point = ruler.measure(LatentExit(threshold=1e9))
    first, _, last = compare(ruler, point, fixed)
    assert (first.cycles, first.difference.mean, first.difference.low, first.difference.high) == (1, 0, 0, 0)
    assert (last.cycles, last.flops) == (3, pytest.approx(1))
    assert not last.does_as_well
    assert last.difference == interval(ruler.losses(point) - ruler.losses(fixed[2]))
    assert increase(ruler, point).mean == pytest.approx(point.loss_increase, abs=1e-9)
    # the rule is read once more than the depth, at least
    assert first.does_as_well == (fixed[0].flops <= point.flops)


@torch.no_grad()
def test_losses_are_those_of_each_block() -> None:
    model, blocks = tiny("qwen3"), tokens(5, 12)
    ruler = Ruler(model, blocks, batch_size=2)
    assert ruler.losses(ruler.full).tolist() == pytest.approx(
        [model(row[None], labels=row[None]).loss.item() for row in blocks], abs=1e-5
    )


def made(flops: float) -> Point:
    return Point(
        rule={"rule": "latent", "threshold": 0.1}, mean_cycles=1.5, depths=(0.5, 0.5), flops_per_token=1.0, flops=flops,
        loss=2.0, loss_increase=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "does_as_well", "said"),
    [
        (-0.2, -0.1, False, "The rule pays."),
        (-0.2, 0.1, True, "The fixed depth does as well: --exit-rule cycles:2 needs no rule."),
        (-0.2, 0.1, False, "The rule pays."),
        (0.1, 0.2, False, "The rule saves compute and costs loss."),
    ],
)
def test_what_is_said(low: float, high: float, does_as_well: bool, said: str) -> None:
    difference = Interval(mean=(low + high) / 2, low=low, high=high)
    best = Comparison(cycles=2, flops=0.8, loss=2.0, difference=difference, does_as_well=does_as_well)
    assert verdict(made(0.7), best).endswith(said)
    assert verdict(made(0.7), None) == "No fixed depth meets the target."


def test_closed_gates_are_told() -> None:
    plain = tiny("qwen3").base
    with pytest.raises(ZerodraftError, match="All gates of the model are closed"):
        Ruler(ZttForCausalLM.from_base(plain, cycles=2), tokens(2, 8))


@torch.no_grad()
def test_cycles_that_are_fed_or_scaled_do_something_behind_closed_gates() -> None:
    plain = tiny("qwen3").base
    for part in ("input_injection", "cycle_scales"):
        model = ZttForCausalLM.from_base(plain, cycles=2, **{part: True})
        with pytest.raises(ZerodraftError, match="All gates of the model are closed"):
            Ruler(model, tokens(2, 8))
        getattr(model, part).weight[-1] = 0.5
        assert Ruler(model, tokens(2, 8)).full.loss > 0
    model = ZttForCausalLM.from_base(plain, cycles=2, residual_streams=2)
    with pytest.raises(ZerodraftError, match="All gates of the model are closed"):
        Ruler(model, tokens(2, 8))
    model.residual_streams.bias[0, 0] = 0.5
    assert Ruler(model, tokens(2, 8)).full.loss > 0


def on_plane(flops: float, loss: float) -> Point:
    return Point(rule=None, mean_cycles=1, depths=(1,), flops_per_token=1, flops=flops, loss=loss, loss_increase=0)


DEPTHS = [on_plane(0.25, 4.0), on_plane(0.5, 3.5), on_plane(0.75, 2.0), on_plane(1.0, 2.1)]


def test_the_line_leaves_out_depths_above_it_and_beyond_the_lowest() -> None:
    assert best_line(DEPTHS) == [DEPTHS[0], DEPTHS[2]]
    assert best_line([on_plane(0.25, 4.0), on_plane(0.5, 3.0), on_plane(1.0, 2.9)]) == [
        on_plane(0.25, 4.0), on_plane(0.5, 3.0), on_plane(1.0, 2.9),
    ]  # fmt: skip
    assert best_line([on_plane(0.5, 3.0), on_plane(1.0, 3.5)]) == [on_plane(0.5, 3.0)]


def test_places_on_the_line() -> None:
    line = best_line(DEPTHS)
    assert on_line(line, 0.5) == (DEPTHS[0], DEPTHS[2], 0.5)
    assert on_line(line, 0.1) == (DEPTHS[0], DEPTHS[0], 0.0)
    assert on_line(line, 0.75) == (DEPTHS[2], DEPTHS[2], 0.0)
    assert on_line(line, 1.0) == (DEPTHS[2], DEPTHS[2], 0.0)
