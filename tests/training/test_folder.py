"""A run's folder: one process at a time, and a kill at any moment leaves what `resume` continues."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.lock import LOCK, locked
from zerodraft.training.base import forward_passes
from zerodraft.training.callbacks import JsonLog, read_log
from zerodraft.training.folder import check_sums, claimed, write_sums
from zerodraft.training.recipe import Recipe
from zerodraft.training.ztt.run import pretrain

# Runs the recipe without an interruption; then again in processes that die instead of renaming a file or folder, or
# when they have half removed a checkpoint, and resumes these.
KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from zerodraft.training.recipe import load_recipe
from zerodraft.training.ztt.run import pretrain

path, work = sys.argv[1], Path(sys.argv[2])

def run(name, resume=False, moment=0):
    if (child := os.fork()) == 0:
        count, replace, rmtree = 0, os.replace, shutil.rmtree
        def counted(*args):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)
        def halfway(tree, **kwargs):
            if moment == -1 and (Path(tree) / "trainer_state.json").exists():
                (Path(tree) / "trainer_state.json").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            rmtree(tree, **kwargs)
        os.replace, shutil.rmtree = counted, halfway
        pretrain(load_recipe(path, [f"output={work / name}"]), resume=resume, callbacks=[])
        (work / "renamed").write_text(str(count))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

# the second one finds the tokenizer and the tokens in the cache
assert run("first") == run("whole") == 0
renamed = int((work / "renamed").read_text())
# recipe, log, two checkpoints, model, results
assert renamed == 6, renamed
moments = [2, 4, 5, 6, -1]
for moment in moments:
    assert run(f"killed{moment}", moment=moment) == -signal.SIGKILL, moment
    assert run(f"killed{moment}", resume=True) == 0, moment
print(*moments)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_at_any_moment_is_resumed_to_the_same_end(make_recipe, tmp_path):
    options = "steps: 2, save_every: 1, keep_checkpoints: 1"
    text = (tmp_path / "recipe.yaml").read_text("utf-8").replace("steps: 8", options)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", KILLS, str(tmp_path / "recipe.yaml"), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    moments = done.stdout.split()
    assert len(moments) == 5
    whole = tmp_path / "whole"
    for moment in moments:
        folder = tmp_path / f"killed{moment}"
        assert read_log(folder / "log.jsonl") == read_log(whole / "log.jsonl")
        name = "model/model.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
        results = json.loads((folder / "results.json").read_text("utf-8"))
        assert (results["steps"], results["tokens"]) == (2, 2 * 2 * 32)
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_a_finished_run_makes_no_further_step(make_recipe):
    recipe = make_recipe("training.steps=3", "training.save_every=3")
    whole = pretrain(recipe, callbacks=[])
    before = read_log(Path(recipe.output) / "log.jsonl")
    (Path(recipe.output) / "results.json").unlink()
    again = pretrain(recipe, resume=True, callbacks=[])
    assert (again["steps"], again["tokens"]) == (whole["steps"], whole["tokens"]) == (3, 3 * 2 * 32)
    assert again["evaluation"] == whole["evaluation"]
    assert read_log(Path(recipe.output) / "log.jsonl") == before


@pytest.mark.parametrize(("batches", "accumulation"), [(7, 3), (6, 3), (2, 5), (1, 1)])
def test_passes_are_those_that_epochs_have(batches, accumulation):
    made = []
    for _ in range(4):
        made += [min(accumulation, batches - first) for first in range(0, batches, accumulation)]
    for steps in range(len(made) + 1):
        assert forward_passes(steps, batches, accumulation) == sum(made[:steps])


def test_one_process_at_a_time(make_recipe):
    recipe = make_recipe("training.steps=1")
    with locked(Path(recipe.output), "taken"):
        for resume in (False, True):
            with pytest.raises(ZerodraftError, match="Another process is training in"):
                pretrain(recipe, resume=resume)
        assert [path.name for path in Path(recipe.output).iterdir()] == [LOCK]
    assert not Path(recipe.output).exists()
    # what is left of one that was killed holds nobody up
    Path(recipe.output).mkdir()
    (Path(recipe.output) / LOCK).touch()
    assert pretrain(recipe, callbacks=[])["steps"] == 1
    assert not (Path(recipe.output) / LOCK).exists()


@pytest.mark.parametrize("name", ["", " ", "/"])
def test_folders_that_are_none(name):
    with (
        pytest.raises(ZerodraftError, match="cannot be the folder"),
        claimed(name, Recipe(output=name), False),
    ):
        pass


def test_folders_with_other_files_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ZerodraftError, match="holds other files"), claimed(str(tmp_path), Recipe(output="x"), False):
        pass
    with (
        pytest.raises(ZerodraftError, match="nothing to resume"),
        claimed(str(tmp_path / "x"), Recipe(output="x"), True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"output": 1}', '{"outptu": "x"}', "\udcff"])
def test_a_recipe_that_cannot_be_read_is_told(tmp_path, text):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "recipe.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ZerodraftError), claimed(str(tmp_path), Recipe(output="x"), True):
        pass


def test_a_checkpoint_is_what_was_written(tmp_path):
    for name in ("trainer_state.json", "parts/optimizer.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    (tmp_path / "notes.txt").write_text("of the user")
    check_sums(tmp_path)
    (tmp_path / "parts" / "optimizer.pt").write_text("parts/optimizer.pT")
    with pytest.raises(ZerodraftError, match=r"'parts/optimizer.pt' in the checkpoint .* is damaged"):
        check_sums(tmp_path)
    (tmp_path / "parts" / "optimizer.pt").unlink()
    os.mkfifo(tmp_path / "parts" / "optimizer.pt")
    with pytest.raises(ZerodraftError, match="is no file"):
        check_sums(tmp_path)
    (tmp_path / "sums.json").unlink()
    with pytest.raises(ZerodraftError, match="is incomplete"):
        check_sums(tmp_path)


@pytest.mark.parametrize("line", ["", "[]", "1", "{", '{"step": "1"}', '{"loss": 1}', "[" * 100_000])
def test_a_log_that_is_none_is_told(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ZerodraftError, match="Line 2 of the log"):
        JsonLog(tmp_path, resumed_step=1)


def test_a_log_is_measured_again_without_a_second_row(tmp_path):
    log = JsonLog(tmp_path)
    log.write(step=1, loss=2.0)
    log.write(step=1, eval_loss=3.0)
    log.write(step=2, loss=1.0)
    resumed = JsonLog(tmp_path, resumed_step=1)
    resumed.write(step=1, eval_loss=3.0)
    resumed.write(step=2, loss=1.0)
    assert [row["step"] for row in read_log(resumed.path)] == [1, 1, 2]
