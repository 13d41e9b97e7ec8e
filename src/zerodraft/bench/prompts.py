"""Prompts by task, a few of them taken evenly from all tasks.

Spec-Bench's rows (`question_id`, `category`, `turns`) are asked their first turn; its eight MT-Bench categories are one
task. Rows of other files are read as `zerodraft distill` reads them, one file being one task.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import json_object, read_text, user_path
from zerodraft.training.prompts import read_prompts

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
DEFAULT = Path("prompts") / "spec_bench_dev.jsonl"
"""Under `$ZERODRAFT_DATA`."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the task that it belongs to, and a name that no other prompt of the run has."""

    id: str
    task: str
    text: str


def default_files() -> tuple[str, ...]:
    """The development half of Spec-Bench, where `$ZERODRAFT_DATA` has it.

    Raises:
        ZerodraftError: it has not.
    """
    root = os.environ.get("ZERODRAFT_DATA")
    if not root:
        raise ZerodraftError(
            "--prompts is missing and ZERODRAFT_DATA is not set: name a file of prompts (.jsonl or .txt)"
        )
    return (str(Path(root) / DEFAULT),)


def read_questions(files: Sequence[str], *, limit: int = 0, seed: int = 0) -> list[Question]:
    """The prompts of all files, task by task in turn.

    Args:
        files: JSONL or text.
        limit: This many, drawn and spread over the tasks; 0: all.
        seed: Of the draw.

    Raises:
        ZerodraftError: a file that cannot be read or holds no prompt, or two prompts with one name.
    """
    tasks: dict[str, list[Question]] = {}
    for name in files:
        for question in _read(name):
            tasks.setdefault(question.task, []).append(question)
    names = [question.id for rows in tasks.values() for question in rows]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ZerodraftError(f"Two prompts are called '{twice}'; give each a question_id of its own.")
    if limit:
        dice = random.Random(seed)
        share = -(-limit // len(tasks))
        # a task with fewer leaves its part to the others
        while sum(min(share, len(rows)) for rows in tasks.values()) < min(limit, len(names)):
            share += 1
        tasks = {task: dice.sample(rows, min(share, len(rows))) for task, rows in tasks.items()}
    longest = max(map(len, tasks.values()))
    rounds = [rows[i] for i in range(longest) for rows in tasks.values() if i < len(rows)]
    return rounds[:limit] if limit else rounds


def _read(name: str) -> Iterator[Question]:
    path = user_path(name)
    rows = list(_spec_bench(path)) if path.suffix.lower() == ".jsonl" else []
    if rows:
        yield from rows
        return
    for number, prompt in enumerate(read_prompts([name]), 1):
        yield Question(f"{path.stem}/{number}", path.stem, prompt.text)


def _spec_bench(path: Path) -> Iterator[Question]:
    """The rows of such a file; nothing if it is another kind."""
    try:
        # split on "\n" only: strings may hold characters that str.splitlines takes for line ends
        lines = read_text(path, "prompt file").split("\n")
    except ZerodraftError:
        return  # the reader of other files says what is wrong
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json_object(line, f"'{path}' line {number}")
            identity, category, text = str(row["question_id"]), str(row["category"]), str(row["turns"][0])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if number == 1:
                return
            raise ZerodraftError(
                f"'{path}' line {number} is not a question like those above: expected question_id, category and turns"
            ) from error
        yield Question(identity, "mt_bench" if category in MT_BENCH else category, text)
