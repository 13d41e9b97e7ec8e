"""Questions of every task in the files that the tasks are read from, made of the words of the tiny tokenizer."""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from zerodraft.evaluation.questions import TASKS

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "fox",
    "who",
    "could",
    "not",
    "sleep",
]


def row_of(task: str, number: int) -> dict[str, Any]:
    """One line of a task's file."""
    words = list(islice(cycle(WORDS), number, number + 9))
    start, choices, gold = " ".join(words[:4]), [" ".join(words[4:6]), words[6], words[7], words[8]], number % 4
    if task == "lambada_openai":
        return {"context": start, "continuation": words[6]}
    if task == "winogrande":
        return {"context_options": [start, choices[0]], "continuation": words[7], "gold": number % 2}
    if task == "sciq":
        names = ("distractor1", "distractor2", "distractor3", "correct_answer")
        return {"question": start, "support": f" {words[4]}", **dict(zip(names, choices, strict=True))}
    if task == "boolq":
        return {"query": f"Passage: {start}\nQuestion: {words[4]}?", "choices": ["no", "yes"], "gold": number % 2}
    return {"query": f"Question: {start}\n", "choices": choices, "gold": gold}


def write_questions(folder: Path, count: int) -> Path:
    """Files of all tasks, with so many questions each."""
    for task, (file, _) in TASKS.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row_of(task, number)) + "\n" for number in range(count)]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return folder
