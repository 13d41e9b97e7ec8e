"""What a run tells the outside: a log of every step as JSON lines, and a one-line progress bar."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import json_object, read_text
from zerodraft.common.outputs import write_whole

logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"
SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal to draw a bar on."""


class JsonLog:
    """Appends one JSON object a line; after a resume, lines beyond the checkpoint are dropped and written anew.

    Args:
        folder: of the run; the file is `log.jsonl` in it.
        resumed_step: optimizer step of the checkpoint that the run continues from, 0 for a new run.
    """

    def __init__(self, folder: str | os.PathLike[str], resumed_step: int = 0) -> None:
        self.path = Path(folder) / LOG_NAME
        kept = [row for row in read_log(self.path) if row["step"] <= resumed_step] if resumed_step else []
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._kept = {(row["step"], *row) for row in kept}

    def write(self, **row: Any) -> None:
        """Appends `row`, which must have a `step`; not if a resumed run only measures again what is there."""
        if (row["step"], *row) in self._kept:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `log.jsonl`; a last line cut short by a crash is left out.

    Raises:
        ZerodraftError: it is no log.
    """
    path = Path(path)
    if not path.exists():
        return []
    *complete, _ = read_text(path, "log").split("\n")
    rows = [json_object(line, f"Line {number} of the log '{path}'") for number, line in enumerate(complete, 1)]
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise ZerodraftError(f"Line {number} of the log '{path}' has no step: remove the file.")
    return rows


class ProgressBar(TrainerCallback):
    """One line on the terminal: steps, loss, tokens per second; instead of the Trainer's, which prints dictionaries.
    Where there is no terminal, a line now and then.

    Args:
        items_per_step: what one optimizer step trains on.
        unit: what these items are.
    """

    def __init__(self, items_per_step: int, unit: str = "tokens") -> None:
        self.items_per_step, self.unit = items_per_step, unit
        self.evaluation = ""
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar where the run starts."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                unit="step",
                disable=not sys.stderr.isatty(),
            )
            self.start, self.first_step = time.perf_counter(), state.global_step
            self.told = self.start

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Shows the latest loss and the throughput since the start."""
        if self.bar is None or not logs:
            return
        if "eval_mat" in logs:
            self.evaluation = f", {logs['eval_mat']:.2f} tokens/pass"
        if "loss" in logs:
            items = (state.global_step - self.first_step) * self.items_per_step
            rate = items / (time.perf_counter() - self.start)
            news = f"loss {logs['loss']:.3f}, {rate:,.0f} {self.unit}/s{self.evaluation}"
            self.bar.set_postfix_str(news)
            if self.bar.disable and time.perf_counter() - self.told > SECONDS_BETWEEN_LINES:
                logger.info("step %d of %d: %s", state.global_step, state.max_steps, news)
                self.told = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
