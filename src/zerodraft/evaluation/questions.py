"""Questions of seven tasks from JSON-lines files, in the words of lm-evaluation-harness's tasks of the same names.

The files are those that many projects exchange: a line has `context` and `continuation` (LAMBADA), `query`, `choices`
and `gold` (PIQA, ARC, BoolQ), `context_options`, `continuation` and `gold` (WinoGrande), or SciQ's own fields.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from zerodraft.common.errors import ZerodraftError, did_you_mean, why
from zerodraft.common.files import json_object, read_text, user_path

Row = dict[str, Any]


def _word(row: Row) -> Row:
    return {"context": row["context"], "continuation": f" {row['continuation']}"}


def _asked(row: Row) -> Row:
    query = f"{row['query'].removeprefix('Passage: ').rstrip()}\nAnswer:"
    return {"query": query, "choices": row["choices"], "gold": row["gold"]}


def _beginnings(row: Row) -> Row:
    return {name: row[name] for name in ("context_options", "continuation", "gold")}


def _sciq(row: Row) -> Row:
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    query = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return {"query": query, "choices": choices, "gold": 3}


class LocalTask(NamedTuple):
    """A task with a file of its own.

    Attributes:
        file: Its place in the data folder.
        made: A question (`context` and `continuation`; `query`, `choices` and `gold`; or `context_options`,
            `continuation` and `gold`) from a line.
    """

    file: str
    made: Callable[[Row], Row]


TASKS = {
    "lambada_openai": LocalTask("lambada/lambada_openai.jsonl", _word),
    "piqa": LocalTask("piqa/piqa_valid_foundry.jsonl", _asked),
    "arc_easy": LocalTask("arc/arc_easy_test.jsonl", _asked),
    "arc_challenge": LocalTask("arc/arc_challenge_test.jsonl", _asked),
    "boolq": LocalTask("boolq/boolq_valid.jsonl", _asked),
    "sciq": LocalTask("sciq/sciq_test.jsonl", _sciq),
    "winogrande": LocalTask("winogrande/winogrande_dev.jsonl", _beginnings),
}


def data_folder(given: str = "") -> Path | None:
    """The folder of the files: the one that was given, else `$ZERODRAFT_DATA/eval` if that is there."""
    if given:
        return user_path(given)
    folder = Path(os.environ.get("ZERODRAFT_DATA", "")) / "eval"
    return folder if os.environ.get("ZERODRAFT_DATA") and folder.is_dir() else None


def read_questions(task: str, folder: Path | None) -> list[Row]:
    """The questions of one of `TASKS`.

    Raises:
        ZerodraftError: an unknown task, no file, or a line that is no question.
    """
    if task not in TASKS:
        raise ZerodraftError(f"there are no questions for the task '{task}'{did_you_mean(task, TASKS)}")
    file, made = TASKS[task]
    path = None if folder is None else folder / file
    if path is None or not path.is_file():
        raise ZerodraftError(
            f"no questions at '{path or file}': give the folder that holds '{file}', or set ZERODRAFT_DATA to the one "
            f"that holds 'eval/{file}'"
        )
    questions = []
    for number, line in enumerate(read_text(path, "file of questions").split("\n"), 1):
        if line.strip():
            where = f"Line {number} of '{path}'"
            row = json_object(line, where)
            try:
                questions.append(made(row))
            except (KeyError, AttributeError) as error:
                raise ZerodraftError(f"{where} is not a question of '{task}': {why(error)}.") from error
    if not questions:
        raise ZerodraftError(f"'{path}' holds no questions: expected a JSON object in every line")
    return questions


def dataset(task: str, data: str = "", **others: Any) -> dict[str, Any]:
    """What lm-eval reads a task from; `data` can be given with `lm_eval --metadata`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(read_questions(task, data_folder(data)))}
