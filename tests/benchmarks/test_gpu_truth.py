"""The job for a GPU: rehearsed at tiny size, cut short, and its weights in pieces."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu.bundle import LIST, join, split
from gpu.publish import FOLDER, ROOTS, published, tables
from gpu.report import Report

ROOT = Path(__file__).resolve().parents[2]
TRUTH = ROOT / "benchmarks" / "gpu" / "truth.py"


def run(out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(TRUTH), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, check=False, timeout=560)
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


def test_a_part_that_did_not_begin_has_not_failed(tmp_path: Path) -> None:
    code, result = run(tmp_path, "--minutes", "0.02", "--only", "decode")
    assert result["parts"]["decode"]["state"].startswith("skipped")
    assert code == 0


def test_a_step_that_fails_loses_nothing(tmp_path: Path) -> None:
    report = Report(tmp_path / "part.json", 60, small=True)
    report.step("good", lambda: {"a": 1})
    report.step("bad", lambda: 1 // 0)
    report.step("long", lambda: 1, needs=100)
    told = json.loads((tmp_path / "part.json").read_text("utf-8"))
    assert {name: step["outcome"] for name, step in told.items()} == {
        "good": "passed",
        "bad": "failed",
        "long": "skipped",
    }
    assert told["good"]["found"] == {"a": 1}
    assert told["bad"]["traceback"][-1].startswith("ZeroDivisionError")
    assert "found" not in told["bad"]


def test_a_step_that_fails_keeps_what_it_found(tmp_path: Path) -> None:
    report = Report(tmp_path / "part.json", 60, small=True)

    def noting(error: Exception) -> None:
        report.note("step", outcome="running", found={"so far": 1})
        raise error

    for error, found, said in (
        (ValueError("no more"), {"so far": 1}, "ValueError('no more')"),
        (AssertionError("too far"), {"so far": 1}, "AssertionError('too far')"),
        (AssertionError({"apart": 2}), {"apart": 2}, "AssertionError"),
        (ValueError({"apart": 2}), {"so far": 1}, "ValueError({'apart': 2})"),
    ):
        report.step("step", lambda error=error: noting(error))
        [step] = json.loads((tmp_path / "part.json").read_text("utf-8")).values()
        assert (step["outcome"], step["found"], step["error"]) == ("failed", found, said)


def test_pieces_become_the_file_again(tmp_path: Path) -> None:
    file, folders = tmp_path / "weights.whl", [tmp_path / "a", tmp_path / "b"]
    file.write_bytes(bytes(range(256)) * 10)
    split(file, dict(zip(folders, (2, None), strict=True)), 1000)
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


def test_a_result_is_published_without_the_machine() -> None:
    places = {root: f"/{root}" for root in ROOTS}
    head = (
        " Name  Self CPU %  Self CPU  CPU total %  CPU total  CPU avg  Self CUDA  %  CUDA total  CUDA avg  # of Calls"
    )
    lines = ["-----", head, " a <4, b>  1.5%  2.5us  1.5%  2.5us  1.0us  1.250ms  2%  1.250ms  1us  12"]
    ways = {"plain": {"steps": 2, "tables": {"device": [*lines, "-----", "Self CUDA time total: 1.500s", ""]}}}
    steps = {
        "profile": {"outcome": "passed", "found": ways},
        "methods": {"outcome": "failed", "error": "E", "found": {"place": 13}, "traceback": ["  File", "E"]},
        "weights": {"outcome": "passed", "found": f"{places['tmp']}/gpu/cache/smollm2"},
        "below a root": {"outcome": "failed", "error": [f"no {place}/x y" for place in places.values()]},
    }
    output = [f"{places['opt']}/torch/warning"]
    result = published({"parts": {"decode": {"state": "ended", "steps": steps, "output": output}}})
    assert result["parts"]["decode"] == {
        "state": "ended",
        "steps": {
            "profile": {
                "outcome": "passed",
                "found": {
                    "plain": {
                        "steps": 2,
                        "tables": {
                            "device": [
                                {"name": "a <4, b>", "self_cpu_ms": 0.0025, "self_cuda_ms": 1.25, "calls": 12},
                                {"name": "Self CUDA in all", "total_ms": 1500.0},
                            ]
                        },
                    }
                },
            },
            "methods": {"outcome": "failed", "error": "E", "found": {"place": 13}},
            "weights": {"outcome": "passed", "found": "smollm2"},
            "below a root": {"outcome": "failed", "error": ["no x y"] * len(ROOTS)},
        },
    }


def test_what_was_not_found_has_no_table() -> None:
    result = json.loads((ROOT / "results" / "gpu" / "truth-h200.json").read_text("utf-8"))
    whole = set(tables(result))
    assert whole == {"parts", "passes", "decode, bfloat16", "decode, float32", "time"}
    steps = result["parts"]["decode"]["steps"]
    del steps["profile"]["found"], steps["methods, float32"]
    steps["costs, bfloat16"]["found"] = {"recorded passes": steps["costs, bfloat16"]["found"]["recorded passes"]}
    assert set(tables(result)) == whole - {"time", "decode, float32"}
    assert set(tables(published(result | {"parts": {}}))) == {"parts"}


def test_the_page_says_what_the_results_say() -> None:
    """If it fails after a new run: the expected tables and figures are what belongs there."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    text = (ROOT / "results" / "gpu" / "truth-h200.json").read_text(encoding="utf-8")
    assert FOLDER.search(text) is None
    result = json.loads(text)
    for name, table in tables(result).items():
        assert table in page, f"docs/gpu.md should have for {name}\n{table}"
    words = " ".join(page.split())
    steps = result["parts"]["decode"]["steps"]
    half, full = (steps[f"methods, {dtype}"]["found"] for dtype in ("bfloat16", "float32"))
    slow, fast = (1e3 / found["methods"]["hf_plain"]["tokens_per_second"] for found in (half, full))
    costs, profiled = steps["costs, bfloat16"]["found"], steps["profile"]["found"]["a draft in every step"]
    draft, one = costs["draft"]["median"], costs["recorded passes"]["1"]["median"]
    asked = sum(count for of_task in full["steps"].values() for *_, count, by_model in of_task if by_model)
    gaps = " and ".join(f"{each['top_gap']:.1f}" for each in full["differences"])
    training = [step["found"] for name, step in result["parts"]["ztt"]["steps"].items() if step["outcome"] == "failed"]
    losses, gradients = ([100 * of[key] for of in training] for key in ("loss_error", "gradient_error"))
    for said in (
        f"(`truth.py`, {result['seconds']:.0f} seconds)",
        f"at logits {gaps} apart",
        f"The loss was {min(losses):.1f} to {max(losses):.1f}% off, "
        f"the gradient {min(gradients):.0f} to {max(gradients):.0f}%",
        f"`full` is {half['headline']['speedup_over_own_plain']:.2f} times as fast as our own plain decoding in "
        "bfloat16",
        f"The {half['headline']['speedup_over_hf_plain']:.1f} times over transformers' plain decoding",
        f"takes {slow:.0f} ms a token and in float32 {fast:.0f}",
        f"A recorded pass over one token takes {one:.2f} ms",
        f"A block draft took {draft:.1f} ms in bfloat16, as long as {draft / one:.1f} recorded passes",
        f"In float32 it took {1e3 * full['phases']['full']['draft'] / asked:.1f} and in the profile",
        f"twice before, {1e3 * profiled['stats']['draft'] / profiled['steps']:.1f}.",
    ):
        assert said in words, f"docs/gpu.md should say: {said}"
    rows = json.loads((ROOT / "results" / "evidence" / "million.json").read_text(encoding="utf-8"))["rows"]
    arms = {row["arm"]: [other for other in rows if other["arm"] == row["arm"]] for row in rows}
    seconds = [of[0]["seconds"] for of in arms.values()]
    speeds = [sum(row["tokens"] for row in of) / of[0]["seconds"] / 1e6 for of in arms.values()]
    tokens = " or ".join(f"{count / 1e6:.1f}" for count in sorted({row["tokens"] for row in rows}))
    said = (
        f"{len(rows)} runs of {tokens} million tokens each. Nine runs of an arm were trained as "
        f"one, in {min(seconds):.0f} to {max(seconds):.0f} seconds, at {min(speeds):.1f} to {max(speeds):.1f} million "
        "tokens a second"
    )
    assert {len(of) for of in arms.values()} == {9}
    assert said in words, f"docs/gpu.md should say: {said}"
    again = json.loads((ROOT / "results" / "gpu" / "truth-h200-mended.json").read_text(encoding="utf-8"))
    assert again["outcomes"] == {"passed": 60}
    assert "all 60 steps passed" in words
