"""`zerodraft eval`: tasks of lm-evaluation-harness for any model, with what the answers took beside the scores."""

import logging
from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.cli.decoding import load_target
from zerodraft.cli.loading import Dtype
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.ztt.rules import rule_of, written_rules

logger = logging.getLogger(__name__)

EVERY = "every"
"""Stands for each number of cycles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Eval(Command):
    """Score a model on tasks of lm-evaluation-harness.

    lambada_openai, piqa, arc_easy, arc_challenge, boolq, sciq and winogrande are read from files in --data; any other
    task, and these without such a folder, as lm-eval does it. Texts are written with drafts, which changes no token.
    Exit rules of a Zero Token Transformer: {rules}, calibrated, off, or every (each number of cycles).
    """

    example: ClassVar[str] = "zerodraft eval models/ztt-million-exits --tasks piqa --exit-rule every --limit 100"

    model: str = positional("MODEL", also=("model", "target"))
    """Directory, hub id or short name."""
    tasks: tuple[str, ...] = metavar("TASK...")
    """Tasks and groups of lm-eval, by name."""
    exit_rule: tuple[str, ...] = metavar("RULE...", default=("off",))
    """When a token's cycles stop; one score for each."""
    drafter: str = metavar("DIR|NAME", default="")
    """For tasks that generate text; default: the model's own in models/, else lookup."""
    data: str = metavar("DIR", default="")
    """Folder of the files (piqa/..., arc/...); default: $ZERODRAFT_DATA/eval if there is one."""
    limit: int = 0
    """Ask only the first N questions of each task; 0: all."""
    batch_size: int = 8
    """Texts in a forward pass."""
    max_length: int | None = None
    """Read only the last N tokens of a question; default: the model's context."""
    dtype: Dtype = "auto"
    """Dtype of the computation; auto: float32 on CPUs, else as stored."""
    out: str = metavar("FILE", default="")
    """Write the scores to this JSON file too."""

    def check(self) -> None:
        """Looks at the numbers and names."""
        from zerodraft.common.outputs import check_file
        from zerodraft.generate.names import check_name

        if self.limit < 0:
            raise ZerodraftError(f"--limit is {self.limit}; it must be 0 (all) or more")
        if self.batch_size < 1:
            raise ZerodraftError(f"--batch-size is {self.batch_size}; it must be at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise ZerodraftError(f"--max-length is {self.max_length}; it must be at least 1")
        if not self._names() or not self.exit_rule:
            raise ZerodraftError(f"--{'exit-rule' if self._names() else 'tasks'} is given without a name")
        check_name(self.drafter)
        if self.out:
            check_file(self.out, "--out")

    def _names(self) -> list[str]:
        return [name for word in self.tasks for name in word.split(",") if name]

    def run(self, console: Console) -> Result:
        """Loads, asks and reports."""
        from zerodraft.common.outputs import write_json
        from zerodraft.common.provenance import provenance
        from zerodraft.evaluation.harness import harness_model, load_task, scores
        from zerodraft.evaluation.questions import data_folder

        make, data = harness_model(), data_folder(self.data)
        # it warns about what is meant here: a model that is loaded, data of one's own
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        tasks = {name: load_task(name, data) for name in self._names()}
        model, tokenizer = load_target(self.model, self.dtype)
        every = [f"cycles:{n}" for n in range(1, getattr(model.config, "cycles", 1) + 1)]
        asked = [rule for word in self.exit_rule for rule in (every if word == EVERY else [word])]
        rules = list(dict.fromkeys(asked))
        for rule in rules:
            rule_of(model, rule)
        results = []
        for rule in rules:
            lm = make(
                model, tokenizer, exit_rule=rule, drafter=self.drafter, batch_size=self.batch_size,
                max_length=self.max_length,
            )  # fmt: skip
            for name, task in tasks.items():
                results += [{"exit_rule": rule, **score._asdict()} for score in scores(lm, task, self.limit)]
                logger.info("%s done (exit rule: %s)", name, rule)
        console.print(_table(results))
        report: Result = {"model": self.model, "limit": self.limit, "batch_size": self.batch_size, "results": results}
        if self.out:
            write_json(user_path(self.out), {**report, **provenance()})
            console.print(f"written to {self.out}")
        return report


def _table(results: list[Result]) -> str:
    """One line for a score, with the columns that any of them has."""
    metrics = list(dict.fromkeys(name for row in results for name in row["metrics"] if "_stderr" not in name))
    costs = [name for name in COSTS if any(name in row["cost"] for row in results)]
    lines = [["task", "questions", "exit rule", *metrics, *(COSTS[name][0] for name in costs)]]
    for row in results:
        found, paid = row["metrics"], row["cost"]
        shown = [_number(found[name], found.get(f"{name}_stderr")) if name in found else "" for name in metrics]
        shown += [f"{paid[name] / COSTS[name][1]:.2f}" if name in paid else "" for name in costs]
        lines.append([row["task"], str(row["samples"]), row["exit_rule"], *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


COSTS = {
    "flops_per_token": ("MFLOPs/token", 1e6),
    "mean_depth": ("cycles/token", 1.0),
    "tokens_per_pass": ("tokens/pass", 1.0),
}
"""What costs are called in the table, and their units."""


def _number(value: float, error: float | None) -> str:
    """A metric with its standard error, where it is a share."""
    return f"{value:.4g}" if error is None or abs(value) > 1 else f"{value:.4f} ± {error:.4f}"


Eval.__doc__ = (Eval.__doc__ or "").format(rules=", ".join(written_rules()))
