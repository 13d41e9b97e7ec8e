"""What `tasks.py` found, and the section of the page that is written from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from evidence_plan import OfRun
from evidence_statistics import estimate, paired
from evidence_table import Look
from evidence_text import grid, interval

BASELINE = "fine-tuned"
START = "(start)"
"""Arm name of the model before training."""

HEAD = """## Tasks

Questions with known answers, put to the models without examples. An answer is chosen by the sum of its tokens' log
probabilities, or by that sum for each of its bytes; the last word of LAMBADA is right if every token of it is the most
likely one. Nats are those of the right answer. Differences are paired by seed; their intervals tell runs apart, not
questions: of n questions a share p has a standard error of sqrt(p (1 - p) / n), about 0.01 for a thousand.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore(OfRun):
    """One model on one task."""

    task: str
    items: int
    accuracy: float
    """Share of the questions whose right answer has the highest sum, or whose word is the most likely one."""
    accuracy_by_bytes: float | None
    """The same with sums for each byte of an answer; None where there are no choices."""
    nats: float
    """Mean over the questions: minus the log probability of the right answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTable(Look):
    """What was found in the runs of a table."""

    benchmark: ClassVar[str] = "tasks"
    script: ClassVar[str] = "tasks.py"

    results: tuple[TaskScore, ...]

    def by_seed(self, task: str, arm: str, figure: str) -> dict[int, float]:
        """A figure of an arm's runs on a task."""
        found = {one.seed: getattr(one, figure) for one in self.results if (one.task, one.arm) == (task, arm)}
        return {seed: value for seed, value in found.items() if value is not None}


def section(found: TaskTable) -> Iterator[str]:
    """Everything about the runs of one table."""
    yield f"### Tasks of {found.table}\n"
    yield f"From `{found.provenance.get('command', '-')}`. Differences are from {BASELINE}.\n"
    header = ["task", "questions", "arm", "seeds", "accuracy", "difference", "by bytes", "difference", "nats"]
    arms = list(dict.fromkeys(one.arm for one in found.results))
    items = {one.task: one.items for one in found.results}
    yield grid(
        [*header, "difference"],
        [[task, str(count), *row(found, task, arm)] for task, count in items.items() for arm in arms],
    )


def row(found: TaskTable, task: str, arm: str) -> Iterator[str]:
    """The cells of an arm on a task."""
    yield from (arm, str(len(found.by_seed(task, arm, "accuracy"))))
    for figure in ("accuracy", "accuracy_by_bytes", "nats"):
        values, base = (found.by_seed(task, which, figure) for which in (arm, BASELINE))
        yield interval(estimate(list(values.values())))
        yield interval(paired(values, base)) if arm not in (BASELINE, START) else "-"
