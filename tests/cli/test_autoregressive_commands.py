"""`train-drafter --kind autoregressive`, and what decodes with the result."""

import json
from pathlib import Path

import pytest

from zerodraft.cli.main import main


def test_train_and_decode(
    plain_dir: Path, completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    words = f"train-drafter --kind autoregressive --target {plain_dir} --data {completions} --out {out}"
    words += " --autoregressive.layers 2 --autoregressive.block-size 3 --held-back.sequences 2"
    words += " --training.steps 2 --training.warmup-steps 1"
    assert main(words.split()) == 0
    said = capsys.readouterr()
    assert "tokens per target pass on 2 held-back completions" in " ".join((said.out + said.err).split())
    results = json.loads((out / "results.json").read_text())
    assert len(results["held_back"]["by_position"]) == 3
    assert results["trained_parameters"] < results["parameters"]
    assert results["recipe"]["training"]["learning_rate"] == 3e-4

    words = f"generate --target {plain_dir} --drafter {out / 'model'} --max-new-tokens 8 --compare --json hello"
    assert main(words.split()) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert result["equal"]
    assert result["stats"]["drafted"] > 0


def test_a_target_in_cycles_is_refused(
    ztt_dir: Path, completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"train-drafter --kind autoregressive --target {ztt_dir} --data {completions} --out {tmp_path / 'out'}"
    assert main(f"{words} --held-back.sequences 2".split()) == 2
    assert "A 'ztt' model cannot be made smaller" in " ".join(capsys.readouterr().err.split())
