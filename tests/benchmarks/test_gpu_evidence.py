"""The evidence that is made on a GPU within minutes, rehearsed on the CPU."""

import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from evidence_table import read_table
from finished_runs import finished_runs
from gpu.evidence import main
from tests.saved import save_target, sizes_of


def test_a_rehearsal(plan_file: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = plan_file(rates={"1e-2": {"learning_rate": 1e-2}, "3e-3": {"learning_rate": 3e-3}}, sweep=1)
    places = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    # two runs of four as one, so that an arm is twice nearly done
    how = ["--rehearse", "--at-once", "2", "--together", "2", "--minutes", "10"]
    assert main([str(file), *places, *how, "--keep", "tiny/ztt/0", "tiny/ztt/1"]) == 0
    table = read_table(tmp_path / "out" / "tiny.json")
    assert sorted(str(row.run) for row in table.rows) == [
        f"{arm}/{rate}/{seed}" for arm in ("vanilla", "ztt") for rate in ("1e-2", "3e-3") for seed in (0, 1)
    ]
    assert all(row.steps == 4 and row.seconds for row in table.rows)
    with tarfile.open(tmp_path / "out" / "models-0.tar") as tar:
        tar.extractall(tmp_path / "kept", filter="data")
    kept = finished_runs([tmp_path / "kept" / "tiny"])
    assert {str(found.run) for found in kept} == {f"ztt/{table.best_rate('ztt')}/{seed}" for seed in (0, 1)}
    (parameters,) = {row.parameters for row in table.rows if row.arm == "ztt"}
    assert [found.model().num_parameters() for found in kept] == [parameters] * 2
    assert "validation loss" in capfd.readouterr().err

    # what stands beside a row makes it again
    row = next(row for row in table.rows if row.arm == "ztt")
    python, script, plan, *words = shlex.split(row.provenance["command"])
    assert (python, script, plan) == ("python", "benchmarks/gpu/evidence.py", file.name)
    again = ["--out", str(tmp_path / "again"), "--runs", str(tmp_path / "others"), "--rehearse"]
    assert main([str(file), *words, *again]) == 0
    rows = read_table(tmp_path / "again" / "tiny.json").rows
    assert [found.loss for found in rows] == [found.loss for found in table.rows if found.arm == "ztt"]


def test_some_arms_alone(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    places = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main([str(plan_file(seeds=[0])), *places, "--rehearse", "--only", "ztt"]) == 0
    table = read_table(tmp_path / "out" / "tiny.json")
    assert [row.arm for row in table.rows] == ["ztt"]
    assert table.plan.baseline == "ztt"


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["ztt", "vanila"], "'vanila' names no arm (did you mean 'vanilla'?)"),
        (["ztt", "other:ztt"], "'other:ztt' names no arm"),
        (["ztt/1e-2/0", "tiny:ztt"], "names 'ztt' of 'tiny' 2 times"),
    ],
)
def test_names_that_cannot_be_meant(
    plan_file: Callable[..., Path], capsys: pytest.CaptureFixture[str], only: list[str], message: str
) -> None:
    assert main([str(plan_file()), "--rehearse", "--only", *only]) == 2
    assert message in capsys.readouterr().err


def test_no_time_leaves_nothing_half_done(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    places = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main([str(plan_file(seeds=[0])), *places, "--rehearse", "--minutes", "0"]) == 0
    assert not list((tmp_path / "out").iterdir())


def test_models_that_exist_are_trained_one_by_one(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    start = save_target(tmp_path / "start")
    model = {"start": str(start), "cycles": 2, **sizes_of(start)}
    file = plan_file(seeds=[0], arms={"vanilla": {"model": {"kind": "plain"}}}, recipe={"model": model})
    places = ["--runs", str(tmp_path / "runs"), "--rehearse"]
    assert main([str(file), "--out", str(tmp_path / "out"), *places]) == 0
    rows = read_table(tmp_path / "out" / "tiny.json").rows
    assert {row.arm: row.seconds for row in rows} == {"vanilla": None, "ztt": None}

    row = rows[-1]
    *_, only, name = shlex.split(row.provenance["command"])
    again = ["--out", str(tmp_path / "again"), "--runs", str(tmp_path / "others"), "--rehearse"]
    assert main([str(file), only, name, *again]) == 0
    assert [one.losses for one in read_table(tmp_path / "again" / "tiny.json").rows] == [row.losses]
