"""The job for a GPU: rehearsed at tiny size, cut short, and its weights in pieces."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu.bundle import LIST, join, split
from gpu.report import Report

TRUTH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "truth.py"


def run(out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, str(TRUTH), "--out", str(out), *words], capture_output=True, check=False)
    return done.returncode, json.loads((out / "truth.json").read_text("utf-8"))


def test_a_rehearsal_passes_every_step(tmp_path: Path) -> None:
    code, result = run(tmp_path, "--rehearse", "--minutes", "8")
    steps = {f"{part}: {name}": step for part, of in result["parts"].items() for name, step in of["steps"].items()}
    assert {name: step for name, step in steps.items() if step["outcome"] != "passed"} == {}
    assert code == 0
    assert all(part["state"].startswith("ended with 0") for part in result["parts"].values())
    assert len(steps) == result["outcomes"]["passed"] > 30
    methods = steps["decode: methods, float32"]["found"]
    assert methods["headline"]["equal"] is True
    assert methods["methods"]["full"]["tokens_per_second"] > 0
    assert "aten::mm" in "\n".join(steps["decode: profile"]["found"]["plain"]["tables"]["host"])
    assert steps["training: eager"]["found"]["ratio"]["median"] > 0


def test_without_time_parts_are_stopped_and_skipped(tmp_path: Path) -> None:
    code, result = run(tmp_path, "--minutes", "0.02", "--only", "facts", "decode")
    assert code == 1
    assert result["parts"]["facts"]["state"].startswith("stopped")
    assert result["parts"]["decode"]["state"].startswith("skipped")


def test_a_step_that_fails_loses_nothing(tmp_path: Path) -> None:
    report = Report(tmp_path / "part.json", 60, small=True)
    assert report.step("good", lambda: {"a": 1}) == {"a": 1}
    assert report.step("bad", lambda: 1 // 0) is None
    assert report.step("long", lambda: 1, needs=100) is None
    told = json.loads((tmp_path / "part.json").read_text("utf-8"))
    assert {name: step["outcome"] for name, step in told.items()} == {
        "good": "passed",
        "bad": "failed",
        "long": "skipped",
    }
    assert told["good"]["found"] == {"a": 1}
    assert told["bad"]["traceback"][-1].startswith("ZeroDivisionError")


def test_pieces_become_the_file_again(tmp_path: Path) -> None:
    file, folders = tmp_path / "weights.whl", [tmp_path / "a", tmp_path / "b"]
    file.write_bytes(bytes(range(256)) * 10)
    split(file, folders, 1000)
    assert [sorted(piece.name for piece in folder.iterdir()) for folder in folders] == [
        [LIST, "weights.whl.00", "weights.whl.01"],
        [LIST, "weights.whl.02"],
    ]
    (tmp_path / "out").mkdir()
    join(folders, tmp_path / "out")
    assert (tmp_path / "out" / "weights.whl").read_bytes() == file.read_bytes()
    with pytest.raises(SystemExit, match=r"missing: weights.whl.02"):
        join([folders[0]], tmp_path / "out")
    (folders[1] / "weights.whl.02").write_bytes(b"x")
    with pytest.raises(SystemExit, match=r"damaged: weights.whl.02"):
        join([*folders[0].iterdir(), *folders[1].iterdir()], tmp_path / "other")
