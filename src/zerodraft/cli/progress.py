"""Long work on one line of a terminal; a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0
"""Where there is no terminal."""


class LiveProgress:
    """Says what is being done and, where it is known, how much of it is done."""

    def __init__(self, console: Console) -> None:
        self._console, self._told = console, time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What stands on the line now."""
        self._bar.update(self._task, description=text, completed=done, total=total)
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._told > SECONDS_BETWEEN_LINES:
            self._told = now
            self._console.print(text if total is None else f"{text}: {done} of {total}")

    def count(self, stage: str, tokens: int) -> None:
        """A stage and the tokens that it has gone through."""
        self.show(f"{stage}: {tokens:,} tokens")
