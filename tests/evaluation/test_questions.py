"""Questions from files: in lm-eval's words, found where one says, and refused in one sentence."""

from pathlib import Path

import pytest

from tests.evaluation.asked import write_questions
from zerodraft.common.errors import ZerodraftError
from zerodraft.evaluation.questions import TASKS, data_folder, read_questions


def test_the_words_are_those_of_lm_eval(tmp_path: Path) -> None:
    write_questions(tmp_path, 2)
    first = {task: read_questions(task, tmp_path)[0] for task in TASKS}
    assert first["lambada_openai"] == {"context": "the cat sat on", "continuation": " upon"}
    assert first["piqa"]["query"] == "Question: the cat sat on\nAnswer:"
    assert first["boolq"]["query"] == "the cat sat on\nQuestion: mat?\nAnswer:"
    assert first["sciq"] == {
        "query": "mat\nQuestion: the cat sat on\nAnswer:", "choices": ["mat once", "upon", "a", "time"], "gold": 3,
    }  # fmt: skip
    assert first["winogrande"]["context_options"] == ["the cat sat on", "mat once"]


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZERODRAFT_DATA", raising=False)
    assert data_folder() is None
    monkeypatch.setenv("ZERODRAFT_DATA", str(tmp_path))
    assert data_folder() is None
    (tmp_path / "eval").mkdir()
    assert data_folder() == tmp_path / "eval"
    assert data_folder(str(tmp_path / "other")) == tmp_path / "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no questions at '.*piqa_valid_foundry.jsonl': give the folder that holds 'piqa/"),
        ("", "holds no questions"),
        ('{"query": "a", "choices": ["b"]}\n', "Line 1 of '.*' is not a question of 'piqa': 'gold' is missing"),
        ("\n[1]\n", "Line 2 of '.*' must be an object"),
    ],
)
def test_files_that_hold_no_questions(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "piqa").mkdir()
        (tmp_path / TASKS["piqa"].file).write_text(text, encoding="utf-8")
    with pytest.raises(ZerodraftError, match=message):
        read_questions("piqa", tmp_path)


def test_unknown_tasks(tmp_path: Path) -> None:
    with pytest.raises(ZerodraftError, match=r"'pica' \(did you mean 'piqa'"):
        read_questions("pica", tmp_path)
