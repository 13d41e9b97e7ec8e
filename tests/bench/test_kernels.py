"""`zerodraft bench kernels`: all sections are measured, and what is timed is what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ztt.tiny import tiny_plain
from zerodraft.bench.kernels import TimedTarget, target_cases
from zerodraft.bench.measure import dumps, interleave, provenance, spread
from zerodraft.bench.search_cost import cases_of, lattice_of, trigrams
from zerodraft.bench.sections import Effort
from zerodraft.cli.main import main
from zerodraft.fast.target import HfTarget


def test_a_quick_run_has_all_sections(
    target_dir: Path, drafter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "kernels.json"
    words = ["--target", str(target_dir), "--drafter", str(drafter_dir), "--quick", "--output", str(output)]
    assert main(["bench", "kernels", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert found == json.loads(output.read_text(encoding="utf-8"))
    assert list(found["sections"]) == [
        *(f"search_{x}" for x in "kMB"),
        "attention",
        *(f"target_{x}" for x in ("tokens", "context", "batch")),
        "step",
    ]
    for section in found["sections"].values():
        for point in section["points"]:
            assert section["x"] in point["at"]
            assert all(values["min"] > 0 for name, values in point["milliseconds"].items() if name != "draft")
    for point in found["sections"]["target_batch"]["points"]:
        assert point["figures"]["largest logit difference"] < 1e-3
    for point in found["sections"]["step"]["points"]:
        parts = {name: values["median"] for name, values in point["milliseconds"].items()}
        assert max(parts, key=lambda name: parts[name]) == "step"
        assert 0 < point["figures"]["overhead, share of a step"] < 1
    assert main(["bench", "report", str(output), "--out", str(tmp_path / "a.html")]) == 0
    assert main(["bench", "report", str(output), "--out", str(tmp_path / "a.md")]) == 0


@torch.no_grad()
def test_passes_leave_the_caches_as_they_were() -> None:
    """Run again and again, a case computes the same: else the times would be of growing contexts."""
    cases, difference = target_cases(tiny_plain("llama"), tokens=4, context=9, batch=2)
    assert difference is not None
    assert difference < 1e-4
    for name in ("lean", "transformers"):
        first, *others = (cases[name]() for _ in range(3))
        assert all(torch.equal(first, other) for other in others)
    refused, nothing = target_cases(tiny_plain("gemma3"), tokens=2, context=5, batch=1)
    assert (list(refused), nothing) == (["transformers"], None)


def test_only_the_passes_over_drafts_are_timed() -> None:
    model = tiny_plain("llama")
    target = TimedTarget(HfTarget(model))
    ids = torch.tensor([[1, 2, 3]])
    target.prefill(ids, ids > 0, ())
    assert (target.seconds, target.device) == (0.0, model.device)
    target.score(ids[:, :1], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool), ())
    assert target.seconds > 0


def test_lattices_hold_the_text_and_no_token_twice() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 500, 2000)
    lattice = lattice_of(text, 6, 5, 1.0, rng)
    assert lattice.ids.shape == (6, 5)
    assert all(len(set(row)) == 5 for row in lattice.ids.tolist())
    assert (np.diff(lattice.log_q, axis=1) <= 0).all()
    windows = np.lib.stride_tricks.sliding_window_view(text, 6)
    assert (windows == lattice.ids[:, 0]).all(1).any()
    with trigrams(text) as session:
        for case in cases_of(text, session, 6, 5, 2, rng).values():
            case()


def test_cases_are_run_in_turn() -> None:
    order: list[str] = []
    cases = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = interleave(cases, repeats=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(runs) for runs in seconds.values()] == [3, 3]


def test_spread_and_a_quick_choice() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "max": 3.0}
    assert spread([4.0])["q1"] == 4.0
    assert Effort(repeats=1, quick=True).pick((1, 2, 4, 8, 16)) == [1, 4]
    assert Effort(repeats=1).pick((1, 2, 4)) == [1, 2, 4]


def test_json_of_a_line_for_each_row_of_figures() -> None:
    value = {"a": [[1, 2], [3, 4.5]], "b": {"c": None, "d": "x"}, "e": [], "f": {}, "g": [{"h": [True]}], "i": 1e-9}
    assert json.loads(dumps(value)) == value
    assert "\n  [3, 4.5]\n" in dumps(value)
    assert '"b": {"c": null, "d": "x"},' in dumps(value)


def test_provenance_names_no_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZERODRAFT_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    words = ["zerodraft", "bench", f"{tmp_path}/data/a.jsonl", f"--drafter={tmp_path}/d", "/elsewhere/x", "--n", "3"]
    words += ["--text", f"b={tmp_path}/data/b", "--plain"]
    found = provenance(seed=3, words=words)
    assert found["command"] == "zerodraft bench data/a.jsonl --drafter=d x --n 3 --text b=data/b --plain"
    monkeypatch.chdir("/")
    assert str(tmp_path) not in provenance(seed=3, words=words)["command"]
    assert (found["seed"], found["threads"]) == (3, torch.get_num_threads())
