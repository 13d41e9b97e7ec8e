"""`zerodraft distill`: from prompt files to completions that read back, and one sentence for each kind of bad input."""

import json
from pathlib import Path

import pytest

from zerodraft.cli.main import main
from zerodraft.training.drafters.completions import read_completions

SMALL = ["--no-chat", "--max-new-tokens", "5", "--batch-size", "2"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "some.txt"
    file.write_text("the cat\nthe fox sat\non the mat\n", encoding="utf-8")
    return file


def distill(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["distill", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_files_to_completions(
    plain_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--target", str(plain_dir), "--prompts", str(prompts), "--out", str(tmp_path / "out"), *SMALL, "--json"]
    code, out, err = distill(capsys, *words)
    assert code == 0, err
    result = json.loads(out.rstrip("\n").split("\n")[-1])
    found = read_completions(tmp_path / "out")
    assert len(found) == result["sequences"] == 3
    assert result["written"] == result["completion_tokens"] == (found.lengths - found.prompt_lengths).sum()
    assert result["tokens_per_second"] > 0
    assert set(found.sources) == {"some"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["target_name"] == str(plain_dir)
    assert manifest["prompt_files"] == ["some"]
    assert "torch" in manifest["versions"]
    code, out, _ = distill(capsys, *words)
    assert code == 0
    assert json.loads(out)["written"] == 0
    code, _, err = distill(capsys, *words, "--seed", "1")
    assert code == 2
    assert "made with other seed" in err


def test_a_limit_draws_some(plain_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", str(plain_dir), "--prompts", str(prompts), "--out", str(tmp_path / "out"), *SMALL]
    code, out, err = distill(capsys, *words, "--limit", "2", "--greedy", "1")
    assert code == 0, err
    assert "2 completions" in out
    assert set(read_completions(tmp_path / "out").temperatures) == {0}


def test_prompts_that_are_too_long_are_told(
    plain_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--target", str(plain_dir), "--prompts", str(prompts), "--out", str(tmp_path / "out"), *SMALL]
    prompts.write_text("the cat\n" + "the fox sat " * 30 + "\n", encoding="utf-8")
    code, out, err = distill(capsys, *words, "--max-prompt-tokens", "20")
    assert code == 0, err
    assert "1 of 2 prompts were left out as too long" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no prompts: name files"),
        (["--prompts", "nowhere.txt"], "'nowhere.txt' cannot be read"),
        (["--invent", "3", "--greedy", "2"], "--greedy is 2.0"),
        (["--invent", "3", "--temperatures", ".nan"], "expected numbers from 0.0001 up"),
        (["--invent", "3", "--no-chat"], "leave out either --invent or --no-chat"),
        (["--invent", "3"], "pass --no-chat"),
        (["--invent", "3", "--limit", "-1"], "--limit is -1"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    words: list[str], message: str, plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = distill(capsys, "--target", str(plain_dir), "--out", str(tmp_path / "out"), *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
