"""Calibration: what is measured is what happens, targets are met or refused with what can be, files stay whole."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.ztt.tiny import tiny, tokens
from zerodraft import (
    ConfidenceExit,
    FixedExit,
    KlExit,
    ZerodraftError,
    ZeroMassExit,
    ZttForCausalLM,
    exit_rule_from_dict,
)
from zerodraft.ztt.calibrate import ComputeBudget, LossBound, calibrate, write_exit_rule
from zerodraft.ztt.flops import count_flops
from zerodraft.ztt.rules import scored_names
from zerodraft.ztt.tradeoff import Ruler, at_level, scored_rule, trade_off

LEVELS = (0.1, 0.5, 1.0)


@pytest.fixture(scope="module")
def model() -> ZttForCausalLM:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return tokens(6, 16)


@torch.no_grad()
def test_a_measurement_is_the_loss_depth_and_flops_of_the_passes(model: ZttForCausalLM, blocks: torch.Tensor) -> None:
    rule = ZeroMassExit(threshold=0.5)
    point = Ruler(model, blocks, batch_size=4).measure(rule)
    with count_flops() as flops:
        out = model(blocks, labels=blocks, use_cache=False, exit_rule=rule)
    full = model(blocks, labels=blocks).loss
    assert 1 < point.mean_cycles < 3
    assert point.mean_cycles == pytest.approx(out.exit_depth.double().mean().item())
    assert point.loss == pytest.approx(out.loss.item(), abs=1e-5)
    assert point.loss_increase == pytest.approx(out.loss.item() - full.item(), abs=1e-5)
    assert point.relative_increase == pytest.approx(out.loss.item() / full.item() - 1, abs=1e-5)
    # in smaller batches the same rows are computed, except for those in which nobody runs any more
    assert point.flops_per_token * blocks.numel() == pytest.approx(flops.total, rel=0.02)
    assert point.depths == pytest.approx([(out.exit_depth == d).double().mean().item() for d in (1, 2, 3)])


@pytest.mark.parametrize("name", scored_names())
def test_levels_are_shares_of_the_scores_and_more_exits_cost_less(
    name: str, model: ZttForCausalLM, blocks: torch.Tensor
) -> None:
    ruler, rule = Ruler(model, blocks), scored_rule(name)
    scores = ruler.scores(rule)
    assert len(scores) == blocks.numel() * 2
    points = trade_off(ruler, partial(at_level, rule, scores), LEVELS)
    cycles = [points[level].mean_cycles for level in LEVELS]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[-1] < cycles[0] <= 3
    assert points[LEVELS[-1]].flops < points[LEVELS[0]].flops
    assert all(point.rule is not None and point.rule["rule"] == name for point in points.values())


def test_the_share_of_scores_above_a_threshold_is_the_level() -> None:
    scores = torch.arange(100.0)
    assert at_level(ZeroMassExit(threshold=0.0), scores, 0.25) == ZeroMassExit(threshold=75.0)
    assert at_level(KlExit(threshold=0.0), scores - 200, 1.0) == KlExit(threshold=200.0)
    assert at_level(ZeroMassExit(threshold=0.0, pool="max"), scores, 1e-9) == ZeroMassExit(threshold=99.0, pool="max")


@pytest.mark.parametrize("target", [ComputeBudget(mean_cycles=2.0), ComputeBudget(flops=0.8)])
def test_a_budget_is_used_but_not_exceeded(target: ComputeBudget, model: ZttForCausalLM, blocks: torch.Tensor) -> None:
    result = calibrate(model, blocks, "zero-mass", target=target, levels=LEVELS, halvings=2)
    assert target.met_by(result.chosen)
    assert result.chosen == Ruler(model, blocks[1::2]).measure(result.rule), "what is measured is between"
    assert result.chosen.loss == min(point.loss for point in result.curve if target.met_by(point))
    assert len(result.curve) > len(LEVELS)
    spent = [point.mean_cycles for point in result.curve]
    # halving came closer to the budget than the first thresholds did
    nearest = min(abs(point.mean_cycles - 2.0) for point in result.curve)
    assert target.flops is not None or nearest < min(abs(spent[0] - 2.0), abs(spent[-1] - 2.0))
    assert {type(point.rule["threshold"]) for point in result.curve if point.rule} == {float, list}, "both forms"


def test_a_loss_bound_holds_and_saves_what_it_can(blocks: torch.Tensor) -> None:
    model = tiny("qwen3", seed=3)
    reach = Ruler(model, blocks[1::2]).measure(FixedExit(cycles=1)).loss_increase
    target = LossBound(absolute=abs(reach) / 2)
    result = calibrate(model, blocks, "latent", target=target, levels=LEVELS, halvings=2)
    assert result.chosen.loss_increase <= abs(reach) / 2
    assert result.chosen.flops == min(point.flops for point in result.curve if target.met_by(point))
    assert json.loads(json.dumps(result.to_dict()))["target"] == {"absolute": abs(reach) / 2}


def test_options_of_a_rule_are_kept(model: ZttForCausalLM, blocks: torch.Tensor) -> None:
    rule = ZeroMassExit(threshold=0.0, pool="max", layers="last")
    found = calibrate(
        model, blocks, rule, target=ComputeBudget(mean_cycles=2.0), levels=LEVELS, halvings=1, policy="latest"
    )
    assert isinstance(found.rule, ZeroMassExit)
    assert (found.rule.pool, found.rule.layers, found.policy) == ("max", "last", "latest")


def test_progress_counts_to_the_end(model: ZttForCausalLM, blocks: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    target = ComputeBudget(mean_cycles=2.0)
    calibrate(model, blocks, target=target, levels=LEVELS, halvings=2, progress=lambda *step: seen.append(step))
    assert seen[-1] == (16, 16)
    assert [done for done, _ in seen[:-1]] == [*range(1, len(seen))]


def test_the_mode_of_the_model_is_left_as_it_was(blocks: torch.Tensor) -> None:
    model = tiny("llama").train()
    Ruler(model, blocks).measure(FixedExit(cycles=2))
    assert model.training


def test_targets_out_of_reach_name_what_can_be_reached(model: ZttForCausalLM, blocks: torch.Tensor) -> None:
    least = Ruler(model, blocks[1::2]).measure(FixedExit(cycles=1))
    with pytest.raises(
        ZerodraftError, match=rf"0\.1 of the FLOPs cannot be reached .* the least is {least.flops:.3f} of"
    ):
        calibrate(model, blocks, target=ComputeBudget(flops=0.1), levels=LEVELS, halvings=1)
    with pytest.raises(ZerodraftError, match=r"at most -1000 nats cannot be reached .* the smallest measured is"):
        calibrate(model, blocks, target=LossBound(absolute=-1000.0), levels=LEVELS, halvings=1)


def test_what_cannot_be_calibrated_is_refused(model: ZttForCausalLM, blocks: torch.Tensor) -> None:
    target = ComputeBudget(mean_cycles=2.0)
    cases = [
        (tiny("llama", cycles=1), blocks, "zero-mass", "one cycle"),
        (tiny("llama", schedule="layer"), blocks, "zero-mass", 'schedule="block"'),
        (tiny("llama", zero_tokens=False), blocks, "zero-mass", "no zero tokens"),
        (model, blocks[:, :1], "zero-mass", "at least one block of two tokens, got 3 of 1"),
        (model, blocks[:0], "zero-mass", "got 0 of 16"),
        (model, blocks, "zero", "choose one of zero-mass, confidence"),
        (model, blocks, FixedExit(cycles=2), "not an exit rule with a threshold"),
    ]
    for candidate, text, rule, message in cases:
        with pytest.raises(ZerodraftError, match=message):
            calibrate(candidate, text, rule, target=target, levels=LEVELS, halvings=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ComputeBudget(), "either as flops or as mean_cycles"),
        (lambda: ComputeBudget(flops=0.5, mean_cycles=2.0), "either as flops or as mean_cycles"),
        (lambda: ComputeBudget(flops=1.5), "1.5 of the FLOPs is not above 0 and at most 1"),
        (lambda: ComputeBudget(mean_cycles=0.5), "0.5 cycles per token is below 1"),
        (lambda: LossBound(), "either as relative or as absolute"),
    ],
)
def test_targets_are_checked(make, message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        make()


def test_the_rule_is_written_into_the_configuration_and_nothing_else(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    rule = ConfidenceExit(threshold=0.123456789)
    write_exit_rule(model, rule, tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert exit_rule_from_dict(after.pop("exit_rule")) == rule
    assert after == {key: value for key, value in before.items() if key != "exit_rule"}
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []
    assert ZttForCausalLM.from_pretrained(tmp_path).calibrated_exit_rule() == rule
    assert model.calibrated_exit_rule() == rule


def test_a_foreign_configuration_is_left_alone(tmp_path: Path) -> None:
    model = tiny("llama")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ZerodraftError, match="not the configuration of a Zero Token Transformer"):
        write_exit_rule(model, ConfidenceExit(threshold=0.5), tmp_path)
    with pytest.raises(ZerodraftError, match="cannot be read"):
        write_exit_rule(model, ConfidenceExit(threshold=0.5), tmp_path / "none")
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
    assert model.config.exit_rule is None
