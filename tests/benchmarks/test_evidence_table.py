"""Plans, and tables of results: which runs are wanted, which rate is best, and files that cannot be right."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evidence import main
from evidence_plan import Plan, Run, chosen, read_plan
from evidence_table import Diverged, Table, joined, open_table, read_table, save_result
from tests.benchmarks.made import made_row
from zerodraft.common.errors import ZerodraftError

ROOT = Path(__file__).parents[2]
RATES = {"1e-2": {"learning_rate": 1e-2}, "1e-3": {"learning_rate": 1e-3}}


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/evidence/*.yaml")), ids=lambda path: path.stem)
def test_shipped_plans_are_valid(path: Path, tmp_path: Path) -> None:
    plan = read_plan(path)
    assert plan.table == path.stem
    models = [plan.recipe_of(run, tmp_path).model for run in plan.runs()]
    assert any(model.kind == "ztt" and model.zero_tokens and model.cycles > 1 for model in models)


def test_all_arms_of_the_first_seed_come_first(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(rates=RATES)
    assert list(map(str, plan.runs()))[:4] == ["vanilla/1e-2/0", "ztt/1e-2/0", "vanilla/1e-3/0", "ztt/1e-3/0"]
    assert all(run.seed == 0 for run in list(plan.runs())[:4])


def test_arms_differ_in_what_they_change_and_in_nothing_else(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan()
    vanilla, ztt = (plan.recipe_of(Run(arm, "1e-2", 1), tmp_path) for arm in plan.arms)
    assert (vanilla.model.cycles, ztt.model.cycles, vanilla.training.learning_rate) == (1, 2, 1e-2)
    assert (vanilla.data, vanilla.seed, vanilla.training) == (ztt.data, 1, ztt.training)
    assert vanilla.output != ztt.output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"baseline": "vanila"}, r"baseline 'vanila' is none of the arms \(did you mean 'vanilla'\?\)"),
        ({"arms": {"ztt": {"data": {"context_length": 8}}}}, "arm 'ztt' changes data, which must be the same"),
        ({"arms": {"ztt": {"modle": {}}}}, r"unknown key 'modle' \(did you mean 'model'\?\)"),
        ({"arms": {"a/b": {}}}, "'a/b' is no name"),
        ({"seeds": []}, "the plan has no seeds"),
        ({"seeds": [1, 1]}, "each one may be named only once"),
        ({"sweep": -1}, r"plan\.sweep is -1"),
        ({"learning": 1}, "unknown key 'learning'"),
    ],
)
def test_plans_that_cannot_be_meant(make_plan: Callable[..., Plan], values: dict, message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        make_plan(**values)


def test_names_of_runs(make_plan: Callable[..., Plan]) -> None:
    runs = list(make_plan().runs())
    assert chosen(runs, "ztt/1e-2/1") == [Run("ztt", "1e-2", 1)]
    assert len(chosen(runs, "ztt")) == 2
    with pytest.raises(ZerodraftError, match=r"no run is called 'zt' \(did you mean 'ztt'\?\)"):
        chosen(runs, "zt")


def test_the_best_rate_is_chosen_on_seeds_that_all_rates_have(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(rates=RATES)
    # by the mean of all seeds 1e-2 would look better
    rows = (made_row(plan, "ztt", 0, 3.0), made_row(plan, "ztt", 1, 1.0), made_row(plan, "ztt", 0, 2.5, "1e-3"))
    assert Table(plan=plan, rows=rows).best_rate("ztt") == "1e-3"
    lost = Diverged(arm="ztt", rate="1e-3", seed=1, recipe={}, why="the loss became nan")
    assert Table(plan=plan, rows=rows, diverged=(lost,)).best_rate("ztt") == "1e-2"
    assert Table(plan=plan).best_rate("ztt") is None


def test_seeds_beyond_the_sweep_get_the_best_rate_alone(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(rates=RATES, sweep=1)
    rows = [made_row(plan, "vanilla", 0, 3.0), made_row(plan, "vanilla", 0, 2.9, "1e-3"), made_row(plan, "ztt", 0, 2.0)]
    wanted = Table(plan=plan, rows=tuple(rows)).wanted()
    assert [str(run) for run in wanted if run.seed == 1] == ["vanilla/1e-3/1"], "ztt is not swept yet"
    rows.append(made_row(plan, "ztt", 0, 2.5, "1e-3"))
    wanted = Table(plan=plan, rows=tuple(rows)).wanted()
    assert [str(run) for run in wanted if run.seed == 1] == ["ztt/1e-2/1", "vanilla/1e-3/1"]


def test_a_table_comes_back_as_it_was_written(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan()
    lost = Diverged(arm="ztt", rate="1e-2", seed=0, recipe=plan.changes_of(Run("ztt", "1e-2", 0)), why="nan")
    table = Table(plan=plan, rows=(made_row(plan, "vanilla", 0, 3.0, seconds=None),), diverged=(lost,))
    save_result(table, tmp_path / "results" / "tiny.json")
    assert read_table(tmp_path / "results" / "tiny.json") == table
    assert open_table(tmp_path / "none.json", plan) == Table(plan=plan)


def test_parts_of_a_table_are_joined(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan, results = make_plan(), tmp_path / "results"
    first = Table(plan=plan, rows=(made_row(plan, "vanilla", 0, 3.0),))
    second = Table(plan=make_plan(arms={"new": {}}, baseline="new"), rows=(made_row(plan, "ztt", 0, 2.0),))
    for part, name in ((first, "first.json"), (second, "second.json")):
        save_result(part, tmp_path / name)
        assert main(["join", str(tmp_path / name), "--results", str(results)]) == 0
    found = read_table(results / "tiny.json")
    assert found.rows == (*first.rows, *second.rows)
    assert (found.plan.baseline, {*found.plan.arms}) == ("vanilla", {"vanilla", "ztt", "new"})
    assert main(["join", str(tmp_path / "second.json"), "--results", str(results)]) == 2
    assert read_table(results / "tiny.json") == found
    for changes, what in (
        ({"recipe": {"training": {"steps": 7}}}, "recipe"),
        ({"arms": {"ztt": {"model": {"cycles": 3}}}}, "ztt"),
    ):
        with pytest.raises(ZerodraftError, match=f"differ in {what}"):
            joined(found, Table(plan=make_plan(**changes)))
    with pytest.raises(ZerodraftError, match="'tiny' and 'other'"):
        joined(found, Table(plan=make_plan(table="other")))


def damage(text: str, how: str) -> str:
    found = json.loads(text)
    if how == "cut":
        return text[: len(text) // 2]
    if how == "missing":
        del found["rows"][0]["tokens"]
    elif how == "nan":
        found["rows"][0]["losses"]["validation"] = [float("nan")]
    elif how == "type":
        found["rows"][0]["curve"] = 3
    elif how == "twice":
        found["rows"] *= 2
    elif how == "recipe":
        found["rows"][0]["recipe"]["model"]["family_name"] = "x"
    elif how == "foreign":
        found = {"benchmark": "decode"}
    return json.dumps(found)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"tiny\.json' is not JSON"),
        ("missing", r"tiny\.json' is damaged \(missing key 'rows\[0\]\.tokens'\): mend it, or move it away"),
        ("nan", r"is damaged \(the losses of vanilla/1e-2/0 are not all there\)"),
        ("type", r"is damaged \('rows\[0\]\.curve' must be a list, got 3\)"),
        ("twice", r"is damaged \(vanilla/1e-2/0 is in it twice\)"),
        ("recipe", r"is damaged \(unknown key 'model\.family_name'"),
        ("foreign", r"is none of 'python benchmarks/evidence\.py run'"),
    ],
)
def test_damaged_files_are_told_in_a_sentence(
    make_plan: Callable[..., Plan], tmp_path: Path, how: str, message: str
) -> None:
    plan, file = make_plan(), tmp_path / "tiny.json"
    save_result(Table(plan=plan, rows=(made_row(plan, "vanilla", 0, 3.0),)), file)
    file.write_text(damage(file.read_text(encoding="utf-8"), how), encoding="utf-8")
    with pytest.raises(ZerodraftError, match=message) as caught:
        open_table(file, plan)
    assert "\n" not in str(caught.value)


def test_results_of_another_recipe_are_not_taken_for_this_plans(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan, file = make_plan(), tmp_path / "tiny.json"
    save_result(Table(plan=plan, rows=(made_row(plan, "ztt", 0, 3.0),)), file)
    with pytest.raises(ZerodraftError, match=r"holds ztt/1e-2/0 with another model\.cycles, training\.steps: give"):
        open_table(file, make_plan(arms={"ztt": {"model": {"cycles": 3}, "training": {"steps": 7}}}))
    # what changes no result may be another, arms may come along, and a value may be named that is the default
    recipe = {"training": {"save_every": 3}, "data": {"cache": "elsewhere"}, "model": {"cycles": 2}}
    assert (
        open_table(file, make_plan(recipe=recipe, arms={"new": {}})).rows
        == Table(plan=plan, rows=(made_row(plan, "ztt", 0, 3.0),)).rows
    )
