"""The line through the best fixed depths by hand, rules measured against it, and what the page says of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evidence_exits import Exits, ExitTable, Measured, draw_exits, section
from evidence_plan import Plan
from evidence_runs import make_runs
from evidence_statistics import verdict
from evidence_table import read_result
from exits import above_line, depths_alone, main, measure_rules
from tests.ztt.tiny import tiny, tokens
from zerodraft import exit_rule_from_dict
from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.compare import Interval, best_line
from zerodraft.ztt.tradeoff import Point, Ruler


def point(flops: float, loss: float, depths: tuple[float, ...] = (0.5, 0.5)) -> Point:
    return Point(rule=None, mean_cycles=1.5, depths=depths, flops_per_token=1, flops=flops, loss=loss, loss_increase=0)


DEPTHS = [point(0.25, 4.0), point(0.5, 3.5), point(0.75, 2.0), point(1.0, 2.1)]


def test_fixed_depths_lie_on_their_own_line_and_cost_what_their_cycles_cost() -> None:
    ruler = Ruler(tiny(), tokens(3, 24))
    fixed = depths_alone(ruler)
    assert fixed[2].flops == pytest.approx(1)
    assert fixed[1].flops == pytest.approx((fixed[0].flops + fixed[2].flops) / 2)
    line = best_line(fixed)
    for depth in line:
        assert above_line(ruler, depth, line).mean == pytest.approx(0, abs=1e-9)
    expected = fixed[1].loss - (fixed[0].loss + fixed[2].loss) / 2
    assert above_line(ruler, fixed[1], (fixed[0], fixed[2])).mean == pytest.approx(expected)


def test_rules_are_measured_on_other_blocks_than_their_thresholds_are_placed_on() -> None:
    ids = tokens(6, 12)
    model = tiny()
    fixed, rules, ceilings = measure_rules(model, ids, levels=(0.3, 1.0))
    assert len(fixed) == 3
    names = ["zero-mass", "confidence", "entropy", "kl", "latent"]
    assert [*rules] == [form for name in names for form in (name, f"{name}, each cycle")]
    assert {*ceilings} == {"losses", "last prediction"}
    for known, guessed in zip(*ceilings.values(), strict=True):
        assert known.loss + known.price * known.flops <= guessed.loss + guessed.price * guessed.flops + 1e-9
    held = Ruler(model, ids[1::2])
    for points in rules.values():
        for measured in points:
            assert measured.point.rule is not None
            again = held.measure(exit_rule_from_dict(measured.point.rule))
            assert again.loss == pytest.approx(measured.point.loss)
            assert again.flops == pytest.approx(measured.point.flops)
    assert rules["latent"][1].point.depths[0] == pytest.approx(1, abs=0.1), "nearly all stop after the first cycle"
    one = tiny(zero_tokens=False)
    first, second = measure_rules(one, ids, levels=(0.3, 0.3001), names=["kl"])[1]["kl"]
    assert first.point is second.point, "the same threshold is measured once"
    assert "zero-mass" not in measure_rules(one, ids[:, :6], levels=(1.0,), names=["zero-mass", "kl"])[1]


def measured(before: float, mean: float, depths: tuple[float, ...] = (0.5, 0.5)) -> Measured:
    above = Interval(mean=mean, low=mean - 0.01, high=mean + 0.01)
    return Measured(level=0.5, point=point(0.6, 3.0, depths), above=above, above_before=before)


def test_thresholds_are_chosen_where_they_were_placed_and_must_tell_tokens_apart() -> None:
    points = (measured(-0.01, 0.03), measured(0.02, -0.03), measured(-0.5, 0.0, (0.99, 0.01)))
    exits = Exits(arm="ztt", rate="1e-2", seed=0, fixed=tuple(DEPTHS), rules={"kl": points, "latent": points[2:]})
    assert exits.chosen("kl") == points[0]
    assert exits.chosen("latent") == points[2], "where none does, the best of all"
    page = "\n".join(section(ExitTable(table="tiny", results=(exits,), provenance={})))
    shown = "| kl | 1.50 | 60.0% | 3.0000 | +0.0300 [+0.0200, +0.0400] | +1.01% | **does not hold** |"
    assert f"| `ztt/1e-2/0` {shown}" in page
    assert exits.best() == ("latent", points[2])
    assert "| 1 to 4 | 25%, 50%, 75%, 100% | 4.0000, 3.5000, 2.0000, 2.1000 |" in page


def test_verdicts() -> None:
    assert verdict(Interval(mean=-0.03, low=-0.04, high=-0.01)) == "holds"
    assert verdict(Interval(mean=-0.03, low=-0.04, high=0.01)) == "undecided"
    assert verdict(Interval(mean=-0.03, low=None, high=None)) == "undecided"


def test_from_runs_to_the_page(
    make_plan: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(seeds=[0])
    make_runs(plan, tmp_path / "tiny.json", tmp_path / "runs", words=["again"], tell=lambda text: None)
    words = [str(tmp_path / "runs" / "tiny"), "--results", str(tmp_path), "--seeds"]
    assert main([*words, "0"]) == 0
    found = read_result(ExitTable, tmp_path / "exit-rules-tiny.json")
    assert [str(exits.run) for exits in found.results] == ["ztt/1e-2/0"], "vanilla has no exits"
    page = "\n".join(section(found))
    draw_exits(found, tmp_path / "page.md")
    (drawn,) = (tmp_path / "figures").iterdir()
    assert drawn.name in page
    assert main([*words, "5"]) == 2
    assert "has more than one cycle" in capsys.readouterr().err
    (tmp_path / "exit-rules-x.json").write_text('{"benchmark": "evidence"}', encoding="utf-8")
    with pytest.raises(ZerodraftError, match=r"none of 'python benchmarks/exits\.py'"):
        read_result(ExitTable, tmp_path / "exit-rules-x.json")
