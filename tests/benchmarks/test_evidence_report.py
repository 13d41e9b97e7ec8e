"""The page of evidence: its figures and verdicts are those of the tables, by hand, and it is the one in docs/."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evidence_beside import read_beside
from evidence_domain import Domain, Domains, Part
from evidence_plan import Plan
from evidence_report import HEAD, phi_of, read_tables, write_report
from evidence_report import markdown as whole_page
from evidence_table import Diverged, Table, difference, save_result
from tests.benchmarks.made import made_row
from zerodraft.common.errors import ZerodraftError

ROOT = Path(__file__).parents[2]

ARMS = {
    "basic": {"model": {"head_layers": 0, "tail_layers": 0, "zero_tokens": False}},
    "unshared": {"model": {"num_hidden_layers": 4, "cycles": 1, "zero_tokens": False}},
}


@pytest.fixture
def table(make_plan: Callable[..., Plan]) -> Table:
    """Three seeds of three arms, one of a fourth."""
    plan = make_plan(arms=ARMS, bound="unshared", seeds=[0, 1, 2])
    losses = {"vanilla": (3.0, 3.1, 3.2), "ztt": (2.95, 3.04, 3.16), "unshared": (2.9, 3.0, 3.1), "basic": (3.05,)}
    rows = [
        made_row(plan, arm, seed, loss, flops=10**9 * (2 if arm == "ztt" else 1))
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return Table(plan=plan, rows=tuple(rows))


def markdown(tables: dict[str, Table]) -> str:
    return whole_page(tables, {})


def row_of(page: str, *beginning: str) -> list[str]:
    """The cells of the one row that begins so."""
    (found,) = [line for line in page.splitlines() if line.startswith(f"| {' | '.join(beginning)} |")]
    return cells(found)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_verdicts_follow_the_intervals(table: Table) -> None:
    page = markdown({"tiny": table})
    # differences -0.05, -0.06 and -0.04: standard deviation 0.01, half width 4.3027 * 0.01 / sqrt(3)
    assert row_of(page, "better than the vanilla model of equal parameters") == [
        "better than the vanilla model of equal parameters", "[tiny](#tiny)", "ztt, vanilla",
        "-0.0500 [-0.0748, -0.0252]", "other -0.0500 [-0.0748, -0.0252]", "1.000x, 2.00x", "3", "**holds**",
    ]  # fmt: skip
    basic = row_of(page, "better than basic cycling")
    assert basic[3:] == ["-0.1000", "other -0.1000", "1.000x, 2.00x", "1", "**undecided**"]
    assert row_of(page, "better than head-tail cycling: zero tokens help")[-1] == "**not tested yet**"
    assert page.count("**not tested yet**") == 5


def test_arms_with_further_options_test_a_claim_unless_it_is_about_zero_tokens(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(arms={"ztt-input": {}, "head-tail": {}})
    losses = {"vanilla": 3.0, "ztt": 2.9, "ztt-input": 2.8, "head-tail": 2.95}
    rows = [made_row(plan, arm, seed, loss + seed) for arm, loss in losses.items() for seed in plan.seeds]
    page = markdown({"tiny": Table(plan=plan, rows=tuple(rows))})
    arms = [cells(line)[2] for line in page.splitlines() if line.startswith("| better than")]
    assert arms == ["ztt, vanilla", "ztt-input, vanilla", "-", "ztt, head-tail", "-", "-"]


def test_zero_tokens_are_tested_where_both_are_fed_again(make_plan: Callable[..., Plan]) -> None:
    arms = ("head-tail", "ztt", "head-tail-input", "ztt-input")
    plan = make_plan(arms={arm: {} for arm in arms}, baseline="head-tail")
    losses = dict(zip(arms, (3.0, 2.9, 2.8, 2.85), strict=True))
    rows = [made_row(plan, arm, seed, loss + seed) for arm, loss in losses.items() for seed in plan.seeds]
    page = markdown({"tiny": Table(plan=plan, rows=tuple(rows))})
    plain = row_of(page, "better than head-tail cycling: zero tokens help")
    assert plain[2:4] == ["ztt, head-tail", "-0.1000 [-0.1000, -0.1000]"]
    fed = row_of(page, "better than head-tail cycling where both are fed the head's output again: zero tokens help")
    assert fed[2:4] == ["ztt-input, head-tail-input", "0.0500 [0.0500, 0.0500]"]
    assert "### Against head-tail" in page


def test_a_claim_that_falls_the_other_way_is_told_as_plainly(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    losses = {"vanilla": (3.0, 3.1), "ztt": (3.1, 3.2001)}
    rows = [made_row(plan, arm, seed, loss) for arm, values in losses.items() for seed, loss in enumerate(values)]
    page = markdown({"tiny": Table(plan=plan, rows=tuple(rows))})
    assert row_of(page, "better than the vanilla model of equal parameters")[-1] == "**does not hold**"


def test_an_arm_that_tried_more_rates_is_not_better_for_that(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(rates={"1e-2": {"learning_rate": 1e-2}, "1e-3": {"learning_rate": 1e-3}})
    rows = [made_row(plan, "vanilla", 0, 3.0), made_row(plan, "ztt", 0, 3.1), made_row(plan, "ztt", 0, 2.0, "1e-3")]
    table = Table(plan=plan, rows=tuple(rows))
    found = difference(table, "ztt", "vanilla")
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert "2.0000" in markdown({"tiny": table}).split("### Against")[0]
    assert difference(Table(plan=plan, rows=tuple(rows[::2])), "ztt", "vanilla") is None, "no rate that both tried"


def test_means_and_differences(table: Table) -> None:
    page = markdown({"tiny": table})
    means, differences = page.split("### Against vanilla")
    ztt = row_of(means, "ztt", "1 + 2 x 1 + 1")
    assert ztt[2:5] == ["yes", "1,000 (1.00x)", "80,000"]
    assert ztt[5:9] == ["2e+09 (2.00x)", "1.0", "1e-2 (1)", "3"]
    assert ztt[9].startswith("3.0500 [")
    assert ztt[-1] == "3.1500, 3.0500"
    assert row_of(means, "basic", "2 x 3")[9] == "3.0500"
    assert row_of(differences, "ztt", "3")[2] == "-0.0500 [-0.0748, -0.0252]"
    assert "| vanilla | 3 |" not in differences


def test_every_run_is_shown_with_what_repeats_it(table: Table) -> None:
    page = markdown({"tiny": table}).split("### Every run")[1]
    assert row_of(page, "ztt", "1e-2", "1") == [
        "ztt", "1e-2", "1", "3.1400, 3.0400", "4.0400", "1,333",
        "`python benchmarks/evidence.py run x --only ztt/1e-2/1`",
    ]  # fmt: skip
    assert page.count("--only") == len(table.rows)


def test_phi_of_arms_by_hand(table: Table) -> None:
    # three layers with one copy of the shared one, four with two; the gain is half of that of the copy, 0.6 and 0.4
    found = phi_of(table, "ztt")
    assert found is not None
    shares = (0.5, 0.6, 0.4)
    assert found.mean == pytest.approx(sum(math.log2(3 * (4 / 3) ** share - 2) for share in shares) / 3)
    assert found.count == 3
    assert phi_of(table, "basic") is None, "six layers deep, the bound has four"
    assert phi_of(table, "unshared") is None, "no cycles"


def test_pairs_at_each_rate(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(seeds=[0, 1], rates={"1e-2": {"learning_rate": 1e-2}, "1e-3": {"learning_rate": 1e-3}})
    # each arm is at its best with another rate
    losses = {("vanilla", "1e-2"): 3.0, ("vanilla", "1e-3"): 3.2, ("ztt", "1e-2"): 2.9, ("ztt", "1e-3"): 2.8}
    rows = [
        made_row(plan, arm, seed, loss + seed / 10, rate=rate)
        for (arm, rate), loss in losses.items()
        for seed in (0, 1)
    ]
    page = markdown({"tiny": Table(plan=plan, rows=tuple(rows))}).split("### At each rate")[1]
    assert row_of(page, "ztt, vanilla", "1e-2")[2:] == ["2", "-0.1000 [-0.1000, -0.1000]"]
    assert row_of(page, "ztt, vanilla", "1e-3")[2:] == ["2", "-0.4000 [-0.4000, -0.4000]"]


def test_parameters_at_equal_loss(table: Table) -> None:
    rows = tuple(replace(row, layer_parameters=400 if row.arm == "unshared" else 300) for row in table.rows)
    page = markdown({"tiny": replace(table, rows=rows)}).split("### Parameters at equal loss")[1]
    assert page.splitlines()[2].startswith("Between vanilla, unshared the loss is taken to be linear")
    # half, 0.6 and 0.4 of the way from 300 parameters to 400
    ratios = [(3 / 4) ** share for share in (0.5, 0.6, 0.4)]
    assert row_of(page, "ztt", "3")[2].startswith(f"{sum(ratios) / 3:.2f} [")
    assert "| basic |" not in page.split("###")[0], "its loss is vanilla's of seed 0 or more, and no size is that small"
    longer = tuple(replace(row, tokens=1) if row.arm == "unshared" else row for row in rows)
    assert "at equal loss" not in markdown({"tiny": replace(table, rows=longer)}), "sizes see equal text"


def test_no_phi_without_its_bound(table: Table) -> None:
    rows = tuple(row for row in table.rows if row.arm != "unshared")
    page = markdown({"tiny": Table(plan=table.plan, rows=rows)})
    assert "phi" not in page


def test_runs_that_diverged_are_told(table: Table) -> None:
    lost = Diverged(arm="ztt", rate="1e-2", seed=9, recipe={}, why="the loss became nan at step 3")
    page = markdown({"tiny": Table(plan=table.plan, rows=table.rows, diverged=(lost,))})
    assert "| `ztt/1e-2/9` | the loss became nan at step 3 |" in page


def test_a_rate_that_lost_a_run_is_no_arms_best_in_any_section(table: Table, tmp_path: Path) -> None:
    results = tuple(
        Domain(
            arm=arm, rate=rate, seed=0, text="other", tokens=9, whole=Part(share=1, loss=loss, entropy=1), parts={},
            temperature=1, loss_at_temperature=loss, loss_beside_it=loss,
        )
        for arm, rate, loss in (("ztt", "1e-2", 3.0), ("ztt", "1e-3", 2.0), ("vanilla", "1e-3", 2.5))
    )  # fmt: skip
    found = Domains(table="tiny", results=results, provenance={})
    save_result(found, tmp_path / Domains.file("tiny"))
    assert read_beside(tmp_path, {"tiny": table})[Domains] == [found]
    lost = replace(table, diverged=(Diverged(arm="ztt", rate="1e-3", seed=1, recipe={}, why="nan"),))
    (kept,) = read_beside(tmp_path, {"tiny": lost})[Domains]
    assert [str(one.run) for one in kept.results] == ["ztt/1e-2/0", "vanilla/1e-3/0"]


def test_without_results_all_claims_wait(tmp_path: Path) -> None:
    write_report(tmp_path / "none", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith(HEAD)
    assert page.count("**not tested yet**") == 7
    assert page.count("Not measured yet.") == 5


def test_a_file_with_another_tables_results_is_refused(table: Table, tmp_path: Path) -> None:
    save_result(table, tmp_path / "other.json")
    with pytest.raises(ZerodraftError, match=r"other\.json' is that of the table 'tiny': rename it"):
        read_tables(tmp_path)


def test_the_page_in_docs_is_that_of_the_committed_results() -> None:
    tables = read_tables(ROOT / "results" / "evidence")
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert page == whole_page(tables, read_beside(ROOT / "results" / "evidence", tables))
    assert all((ROOT / "docs" / "figures" / f"evidence-{name}-losses.png").is_file() for name in tables)
