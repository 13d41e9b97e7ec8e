"""`zerodraft ngram` builds from every kind of file, and what it builds is what the library builds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zerodraft.cli.main import main
from zerodraft.decoding.ngram import open_table
from zerodraft.decoding.ngram_build import build_table

TEXTS = ["the cat sat on the mat.", "the cat sat on the cat.", "once upon a time\u2028there was a fox."]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code = main(["ngram", *map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out.split("\n")[-2])


def shard(folder: Path, sequences: list[list[int]]) -> Path:
    folder.mkdir()
    np.concatenate([np.array(tokens, "<u2") for tokens in sequences]).tofile(folder / "a.bin")
    lines = [json.dumps({"n": len(tokens), "p": 1, "temp": 0.0, "src": "prompt"}) for tokens in sequences]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def same(path: Path, sequences: list[list[int]], vocab_size: int, order: int = 3) -> None:
    found, wanted = open_table(path), build_table([np.array(s) for s in sequences], vocab_size, order=order)
    assert (found.counts, found.vocab_size) == (wanted.counts, vocab_size)
    contexts = np.array([s[i : i + 2] for s in sequences for i in range(len(s) - 1)])
    assert (found.score(contexts, np.arange(vocab_size)) == wanted.score(contexts, np.arange(vocab_size))).all()


def test_from_text_and_jsonl(
    tmp_path: Path, plain_dir: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    rows = [json.dumps({"said": text}, ensure_ascii=False) for text in TEXTS[1:]]
    (tmp_path / "b.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "new" / "x.ngram"
    result = run(
        capsys, "build", tmp_path / "a.txt", tmp_path / "b.jsonl", "--text-field", "said", "--target", plain_dir,
        "--out", out,
    )  # fmt: skip
    same(out, tokens, len(tokenizer))
    assert result["documents"] == 3
    assert result["tokens"] == sum(map(len, tokens))
    assert result["bytes"] == out.stat().st_size
    assert os.listdir(tmp_path / "new") == ["x.ngram"]


def test_from_completions_and_what_info_says(
    tmp_path: Path, plain_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences = [[5, 6, 7, 5, 6, 7, 2], [5, 6, 9, 2]]
    folder, out = shard(tmp_path / "completions", sequences), tmp_path / "x.ngram"
    run(capsys, "build", folder, "--target", plain_dir, "--out", out, "--order", 2)
    same(out, sequences, 300, order=2)
    info = run(capsys, "info", out)
    assert (info["order"], info["vocab_size"], info["tokens"]) == (2, 300, 11)
    assert "Kneser-Ney" in info["smoothing"]
    assert info["files"] == ["completions"]
    assert str(tmp_path) not in json.dumps(info)
    # one file of the pair is enough to name it
    for file in ("a.bin", "a.jsonl"):
        run(capsys, "build", folder / file, "--target", plain_dir, "--out", out)
        same(out, sequences, 300)


def test_words_for_kenlm(tmp_path: Path, plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shard(tmp_path / "completions", [[5, 6, 7], [8, 9]])
    run(capsys, "words", folder, "--target", plain_dir, "--out", tmp_path / "words.txt")
    assert (tmp_path / "words.txt").read_bytes() == b"5 6 7\n8 9\n"
    assert sorted(os.listdir(tmp_path)) == ["completions", "words.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build"], "FILE... is missing"),
        (["bild", "a.txt"], "unknown command 'ngram bild' (did you mean 'ngram build'?)"),
        (["build", "a.txt", "--out", "x"], "--target is missing"),
        (["build", "a.txt", "--target", "x"], "--out is missing"),
        (["build", "a.txt", "--target", "x", "--out", "."], "--out is '.', a directory"),
        (["build", "a.txt", "--target", "x", "--out", "y", "--order", "0"], "--order is 0"),
        (["build", "a.txt", "--target", "x", "--out", "y", "--min-count", "0"], "--min-count is 0"),
        (["build", "a.txt", "--target", "x", "--out", f"{__file__}/y/z"], "no file can be made"),
        (["info", "a", "b"], "unexpected word 'b'"),
        (["info", "nowhere.ngram"], "'nowhere.ngram' cannot be read"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ngram", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_files_leave_nothing(tmp_path: Path, plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.ngram"
    folder = shard(tmp_path / "completions", [[5, 6, 299, 300]])
    assert main(["ngram", "build", str(folder), "--target", str(plain_dir), "--out", str(out)]) == 2
    assert "token 300, but the vocabulary only tokens 0 to 299" in capsys.readouterr().err
    assert main(["ngram", "build", str(tmp_path / "no.txt"), "--target", str(plain_dir), "--out", str(out)]) == 2
    assert "no data at" in capsys.readouterr().err
    assert main(["ngram", "build", str(folder), "--target", str(plain_dir), "--out", "/proc/self/x/y.ngram"]) == 2
    assert "/proc/self/x/y.ngram" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["completions"]


def test_as_a_program(tmp_path: Path, plain_dir: Path) -> None:
    folder = shard(tmp_path / "completions", [[5, 6, 7, 5, 6, 7, 2]])
    words = ["ngram", "build", str(folder), "--target", str(plain_dir), "--out", str(tmp_path / "x.ngram")]
    done = subprocess.run([sys.executable, "-m", "zerodraft", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 tokens in 1 documents -> ")
    assert done.stderr == ""
