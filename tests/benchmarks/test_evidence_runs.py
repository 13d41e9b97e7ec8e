"""Runs of a tiny plan: made once, gone on with after a kill or a pause, told apart, and reported."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence import main
from evidence_plan import Plan, Run
from evidence_runs import Paused, curve, losses_by_cycle, make_run, make_runs, progress
from evidence_table import Row, Table, read_table
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.lock import locked
from zerodraft.training.folder import last_checkpoint
from zerodraft.training.ztt.trainer import ZttTrainer

ROOT = Path(__file__).parents[2]


def run_all(plan: Plan, folder: Path, **options: Any) -> Table:
    return make_runs(plan, folder / "tiny.json", folder / "runs", words=["again"], tell=lambda text: None, **options)


def test_a_plan_from_runs_to_report(
    plan_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = ZttTrainer.training_step

    def watched(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(ZttTrainer, "training_step", watched)
    words = ["--results", str(tmp_path / "results")]
    run = ["run", str(plan_file()), "--runs", str(tmp_path / "runs"), *words]
    assert main([*run, "--only", "vanilla"]) == 0
    assert main(run) == 0
    table = read_table(tmp_path / "results" / "tiny.json")
    assert [str(row.run) for row in table.rows] == ["vanilla/1e-2/0", "vanilla/1e-2/1", "ztt/1e-2/0", "ztt/1e-2/1"]

    batches = torch.stack(seen).unflatten(0, (4, 6))
    assert torch.equal(batches[0], batches[2]), "arms of one seed read the same text in the same order"
    assert torch.equal(batches[1], batches[3])
    assert not torch.equal(batches[0], batches[1])

    vanilla, ztt = table.rows[0], table.rows[2]
    assert (len(vanilla.losses["validation"]), len(ztt.losses["other"])) == (1, 2)
    assert vanilla.layer_parameters == ztt.layer_parameters < vanilla.parameters < ztt.parameters
    assert ztt.tokens == vanilla.tokens == 6 * 2 * 16
    assert 1.2 < ztt.flops / vanilla.flops < 2
    assert len(ztt.curve) == 6
    assert ztt.provenance["command"].endswith("--only ztt/1e-2/0")

    assert main(run) == 0
    assert len(seen) == 24, "nothing is made twice"

    assert main(["report", "--page", str(tmp_path / "docs" / "evidence.md"), *words]) == 0
    page = (tmp_path / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert "| ztt | 1 + 2 x 1 + 1 | yes |" in page
    assert f"{ztt.loss:.4f}" in page
    drawn = [f"evidence-tiny-{what}.png" for what in ("curves", "losses")]
    assert sorted(path.name for path in (tmp_path / "docs" / "figures").iterdir()) == drawn
    assert all(name in page for name in drawn)


def test_a_killed_run_goes_on_from_its_checkpoint(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    file = plan_file(seeds=[0], recipe={"training": {"steps": 120, "save_every": 10}})
    words = [str(ROOT / "benchmarks" / "evidence.py"), "run", str(file), "--only", "ztt"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    places = ["--runs", str(killed), "--results", str(killed)]
    run = killed / "tiny" / "ztt" / "1e-2" / "0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words, *places], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while last_checkpoint(run) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert last_checkpoint(run) is not None
    assert not (killed / "tiny.json").exists()

    assert main([*words[1:], *places]) == 0
    assert main([*words[1:], "--runs", str(whole), "--results", str(whole)]) == 0
    (ours,), (theirs,) = (read_table(place / "tiny.json").rows for place in (killed, whole))
    assert (ours.losses, ours.curve, ours.tokens) == (theirs.losses, theirs.curve, theirs.tokens)


def test_a_run_stops_at_a_checkpoint_when_the_time_is_over(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan, run = make_plan(seeds=[0]), Run("ztt", "1e-2", 0)
    with pytest.raises(Paused):
        make_run(plan, run, tmp_path / "stopped", ["again"], deadline=-math.inf)
    output = tmp_path / "stopped" / "ztt" / "1e-2" / "0"
    assert str(last_checkpoint(output)).endswith("checkpoint-1")
    ours = make_run(plan, run, tmp_path / "stopped", ["again"])
    theirs = make_run(plan, run, tmp_path / "whole", ["again"])
    assert isinstance(ours, Row)
    assert isinstance(theirs, Row)
    assert (ours.losses, ours.curve) == (theirs.losses, theirs.curve)


def test_no_run_begins_after_the_time(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    assert run_all(make_plan(), tmp_path, minutes=0).rows == ()
    assert not (tmp_path / "tiny.json").exists()


def test_a_finished_run_is_collected_where_the_table_is_gone(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(seeds=[0])
    first = run_all(plan, tmp_path, only="vanilla")
    (tmp_path / "tiny.json").unlink()
    monkeypatch.setattr("evidence_runs.pretrain", lambda *_, **__: pytest.fail("trained once more"))
    again = run_all(plan, tmp_path, only="vanilla")
    assert [row.losses for row in again.rows] == [row.losses for row in first.rows]


def test_the_folder_of_another_recipe_is_refused(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    run_all(make_plan(seeds=[0]), tmp_path, only="vanilla")
    (tmp_path / "tiny.json").unlink()
    with pytest.raises(ZerodraftError, match=r"holds a run with another model\.cycles"):
        run_all(make_plan(seeds=[0], arms={"vanilla": {"model": {"cycles": 2}}}), tmp_path, only="vanilla")


def test_one_process_at_a_time(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    with (
        locked(tmp_path / "runs" / "tiny", "held"),
        pytest.raises(ZerodraftError, match="Another process makes the runs in"),
    ):
        run_all(make_plan(), tmp_path)


def test_a_rate_that_is_too_high_is_noted_and_the_rest_goes_on(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    rates = {"1e20": {"learning_rate": 1e20}, "1e-2": {"learning_rate": 1e-2}}
    plan = make_plan(seeds=[0], rates=rates, recipe={"training": {"max_grad_norm": 0, "steps": 12}})
    table = run_all(plan, tmp_path, only="vanilla")
    assert [str(found.run) for found in table.diverged] == ["vanilla/1e20/0"]
    assert "the loss became" in table.diverged[0].why
    assert [str(row.run) for row in table.rows] == ["vanilla/1e-2/0"]
    assert read_table(tmp_path / "tiny.json") == table


def test_the_list_of_runs(plan_file: Callable[..., Path], make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    rates = {"1e-2": {"learning_rate": 1e-2}, "1e-3": {"learning_rate": 1e-3}}
    plan = make_plan(rates=rates, sweep=1, recipe={"training": {"steps": 3}})
    table = run_all(plan, tmp_path, only="vanilla/1e-2/0")
    with pytest.raises(Paused):
        make_run(plan, Run("ztt", "1e-2", 0), tmp_path / "runs" / "tiny", ["again"], deadline=-math.inf)
    lines = [line.split(maxsplit=1) for line in progress(plan, tmp_path / "tiny.json", tmp_path / "runs")]
    assert lines == [
        ["vanilla/1e-2/0", f"validation loss {table.rows[0].loss:.4f}"],
        ["ztt/1e-2/0", "at step 1"],
        ["vanilla/1e-3/0", "left"],
        ["ztt/1e-3/0", "left"],
        ["seeds", "1: each arm at its best rate, once that is known"],
    ]


def test_mistakes_are_a_sentence_and_a_status(
    plan_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", str(plan_file()), "--only", "zt", "--results", str(tmp_path), "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "no run is called 'zt' (did you mean 'ztt'?)\n"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("{", encoding="utf-8")
    assert main(["report", "--results", str(tmp_path / "results"), "--page", str(tmp_path / "page.md")]) == 2
    assert "a.json' is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_curves_are_means_of_stretches() -> None:
    log = [{"step": step, "loss": float(step)} for step in range(1, 6)] + [{"step": 5, "eval_validation_loss_1": 9.0}]
    assert curve(log, points=2) == ((3, 2.0), (5, 4.5))
    assert curve([], points=2) == ()


def test_losses_by_text_and_cycle() -> None:
    flat = {"eval_a_loss_1": 3.0, "eval_a_perplexity_1": 20.0, "eval_a_loss_2": 2.0, "eval_a_bits_per_byte": 1.0,
            "eval_loss_of_b_loss_1": 4.0}  # fmt: skip
    assert losses_by_cycle(flat) == {"a": (3.0, 2.0), "loss_of_b": (4.0,)}
