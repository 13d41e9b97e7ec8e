"""Completions on disk: what is read is what was written, and one sentence for each way in which it can be broken."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.drafters.completions import read_completions

ROWS = {"a": [([5, 6, 7, 2], 2, 0.0), ([9], 0, 0.8)], "b": [([1, 1, 3], 3, 0.0)]}


def write(folder: Path, name: str, rows: list[tuple[list[int], int, float]], dtype: str = "<u2") -> None:
    folder.mkdir(exist_ok=True)
    np.concatenate([np.array(tokens, dtype) for tokens, _, _ in rows]).tofile(folder / f"{name}.bin")
    lines = [json.dumps({"n": len(t), "p": p, "temp": temp, "src": "prompt\u2028x"}) for t, p, temp in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        write(tmp_path / "data", name, rows)
    (tmp_path / "data" / "README.md").write_text("not a shard")
    (tmp_path / "data" / "c.bin").write_bytes(b"tokens whose index is not there yet")
    return tmp_path / "data"


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_sequences_come_back_in_order(folder: Path, dtype: str) -> None:
    write(folder, "b", ROWS["b"], dtype)
    found = read_completions(folder)
    expected = ROWS["a"] + ROWS["b"]
    assert len(found) == 3
    for index, (tokens, prompt_length, temperature) in enumerate(expected):
        got, length = found[index]
        assert got.dtype == np.int64
        assert got.tolist() == tokens
        assert length == prompt_length
        assert found.temperatures[index] == np.float32(temperature)
    assert found[-1][0].tolist() == [1, 1, 3]
    assert (found.lengths - found.prompt_lengths).sum() == 3
    assert found.shards == ("a", "b")
    with pytest.raises(IndexError):
        found[3]


def test_single_files_in_the_order_given(folder: Path) -> None:
    found = read_completions([folder / "b.bin", str(folder / "a.jsonl")])
    assert [len(found[i][0]) for i in range(3)] == [3, 4, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not an entry"),
        ("[]", "line 1 is not an entry"),
        ('{"n": 4, "p": 2}', "line 1 is not an entry"),
        ('{"n": 4, "p": 5, "temp": 0}', "n=4 tokens with p=5"),
        ('{"n": 0, "p": 0, "temp": 0}', "n=0"),
        ('{"n": 4.0, "p": 2, "temp": 0}', "whole numbers"),
        ('{"n": 4, "p": 2, "temp": NaN}', "temp=nan"),
        ('{"n": 9, "p": 2, "temp": 0}', "10 bytes, but its index counts 9 tokens, which take 18 or 36"),
    ],
)
def test_a_broken_index_is_one_sentence(folder: Path, line: str, message: str) -> None:
    (folder / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ZerodraftError, match=r".*") as caught:
        read_completions(folder)
    assert message in str(caught.value)
    assert "a." in str(caught.value)


def test_tokens_cut_off(folder: Path) -> None:
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-1])
    with pytest.raises(ZerodraftError, match="9 bytes, but its index counts 5 tokens"):
        read_completions(folder)


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    (folder / "a.bin").unlink()
    with pytest.raises(ZerodraftError, match="beside their index cannot be read"):
        read_completions(folder)
    with pytest.raises(ZerodraftError, match="No completions at"):
        read_completions(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZerodraftError, match="zerodraft distill"):
        read_completions(tmp_path / "empty")
    (tmp_path / "empty" / "a.jsonl").touch()
    (tmp_path / "empty" / "a.bin").touch()
    with pytest.raises(ZerodraftError, match="are empty"):
        read_completions(tmp_path / "empty")


def test_the_shared_completions_of_smollm2() -> None:
    checkout = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("ZERODRAFT_DATA", checkout.parent / "shared" / "data")) / "smollm2_distill"
    if not folder.is_dir():
        pytest.skip(f"no completions of SmolLM2 in '{folder.parent}': set ZERODRAFT_DATA")
    found = read_completions(folder)
    assert len(found) == 495 + 2396
    assert (found.lengths - found.prompt_lengths).sum() == 112_433 + 369_479
    assert max(int(found[i][0].max()) for i in range(0, len(found), 97)) < 49_152
