"""What a part of a job finds, on the disk as it is found: a part that dies later loses nothing of it."""

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zerodraft.common.outputs import write_json

LINES = 12
"""Of a traceback, its end."""


class Report:
    """The outcomes of one part, in a JSON file that is written whole after each.

    Args:
        path: The file.
        seconds: What the part may take.
        small: Sizes for a rehearsal on a CPU.
    """

    def __init__(self, path: Path, seconds: float, *, small: bool) -> None:
        self.path, self.small = path, small
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self._end - time.monotonic()

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step(self, name: str, run: Callable[[], Any], *, needs: float = 0.0) -> None:
        """Runs it, unless fewer seconds than it needs are left; `found` in the file is what it returns, as JSON.

        Of a step that fails, `found` is the dict that an assertion of it was about, or else what it had noted as found.
        """
        if self.left < needs:
            self.note(name, outcome="skipped", why=f"{self.left:.0f} s are left, it needs {needs:.0f}")
            return
        began = time.monotonic()
        self.note(name, outcome="running")
        values: dict[str, Any]
        try:
            found = run()
            if self.device.type == "cuda":
                # errors of kernels come late
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, the other steps go on
            end = traceback.format_exc().rstrip().split("\n")[-LINES:]
            values = {"outcome": "failed", "error": repr(error)[:300], "traceback": end}
            known = {name: value for name, value in self.outcomes[name].items() if name == "found"}
            match error.args:
                case [dict(asserted), *_] if isinstance(error, AssertionError):
                    known, values["error"] = {"found": asserted}, "AssertionError"
            values |= known
        else:
            values = {"outcome": "passed", "found": found}
        self.note(name, **values, seconds=round(time.monotonic() - began, 3))

    def note(self, name: str, **values: Any) -> None:
        """Puts the outcome of a step on the disk, whatever is known of it."""
        self.outcomes[name] = values
        write_json(self.path, self.outcomes, indent=1)
