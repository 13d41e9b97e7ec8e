"""Zero-shot tasks on finished runs: how often a model finds the answer, beside the model that the runs began with.

    ZERODRAFT_DATA=DIR python benchmarks/tasks.py runs/evidence/retrofit

Sums of log probabilities are those of lm-evaluation-harness, as are the prompts; it is not used itself, since it is
not on bare machines with a GPU. Writes
`results/evidence/tasks-TABLE.json`, from which `python benchmarks/evidence.py report` makes a section of the page.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from evidence_plan import Run
from evidence_tasks import START, TaskScore, TaskTable
from finished_runs import FinishedRun, check_same_text, look, look_arguments
from zerodraft.common.errors import ZerodraftError
from zerodraft.evaluation.likelihood import Answer, Reader
from zerodraft.evaluation.questions import data_folder, read_questions
from zerodraft.models.loading import default_device, load_pretrained
from zerodraft.models.resolve import resolve

TASKS = {"lambada": "lambada_openai", "piqa": "piqa", "arc-easy": "arc_easy"}
"""What lm-evaluation-harness calls them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A question: a text, and what may follow it."""

    context: str
    choices: tuple[str, ...]
    """One alone is a word to be guessed."""
    gold: int = 0


def read_items(task: str, limit: int) -> list[Item]:
    """The questions of a task in `$ZERODRAFT_DATA`, taken evenly; 0: all.

    Raises:
        ZerodraftError: they are not there.
    """
    rows = read_questions(TASKS[task], data_folder())
    if 0 < limit < len(rows):
        rows = [rows[at * len(rows) // limit] for at in range(limit)]
    return [item_of(row) for row in rows]


def item_of(row: dict[str, Any]) -> Item:
    """A question from its fields."""
    if "continuation" in row:
        return Item(context=row["context"], choices=(row["continuation"],))
    return Item(context=row["query"], choices=tuple(f" {choice}" for choice in row["choices"]), gold=row["gold"])


def answers(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[Answer]:
    """How likely the second text of each pair is after the first."""
    encode: Callable[[str], list[int]] = partial(tokenizer.encode, add_special_tokens=False)
    texts = ((encode(context), encode(context + choice)) for context, choice in pairs)
    ids = [(before, whole[len(before) :]) for before, whole in texts]
    return Reader(model=model, batch_size=batch_size).answers(ids)


def score(run: Run, task: str, items: Sequence[Item], model: Any, tokenizer: Any, batch_size: int) -> TaskScore:
    """One model on one task."""
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    found = iter(answers(model, tokenizer, pairs, batch_size))
    right, right_by_bytes, nats = 0, 0, 0.0
    for item in items:
        mine = list(islice(found, len(item.choices)))
        nats -= mine[item.gold].log_p
        if len(mine) == 1:
            right += mine[0].is_greedy
            continue
        sums = [one.log_p for one in mine]
        sizes = [len(choice.encode()) - 1 for choice in item.choices]
        right += sums.index(max(sums)) == item.gold
        means = [value / max(size, 1) for value, size in zip(sums, sizes, strict=True)]
        right_by_bytes += means.index(max(means)) == item.gold
    has_choices = any(len(item.choices) > 1 for item in items)
    return TaskScore(
        **run._asdict(), task=task, items=len(items), accuracy=right / len(items),
        accuracy_by_bytes=right_by_bytes / len(items) if has_choices else None, nats=nats / len(items),
    )  # fmt: skip


def measure(runs: list[FinishedRun], options: Namespace) -> Iterator[TaskScore]:
    """The model that the runs began with, if there is one, and all runs.

    Raises:
        ZerodraftError: questions are missing, or the runs are not of one table with one rate and one start.
    """
    check_same_text(runs)
    for what, values in (
        ("rates", {one.run.rate for one in runs}),
        ("starts", {one.recipe.model.start for one in runs}),
    ):
        if len(values) > 1:
            raise ZerodraftError(f"the runs have several {what}, {', '.join(map(str, values))}: name folders with one")
    tasks = {task: read_items(task, options.items) for task in TASKS}
    start = runs[0].recipe.model.start
    folders = {finished.run: finished.folder / "model" for finished in runs}
    if start is not None:
        folders = {Run(START, "-", 0): resolve(start), **folders}
    tokenizer = runs[0].tokenizer()
    for run, folder in folders.items():
        model: Any = load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
        model = model.eval().to(default_device())
        for task, items in tasks.items():
            yield score(run, task, items, model, tokenizer, options.batch)


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    parser = look_arguments(__doc__)
    parser.add_argument("--items", type=int, default=0, help="of each task, taken evenly; 0: all (default 0)")
    parser.add_argument("--batch", type=int, default=64, help="texts in a pass (default 64)")
    return look(TaskTable, measure, parser, words)


if __name__ == "__main__":
    sys.exit(main())
