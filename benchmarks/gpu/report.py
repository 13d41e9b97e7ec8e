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

    def step(self, name: str, run: Callable[[], Any], *, needs: float = 0.0) -> Any:
        """What `run` returns (its JSON goes to the file), or None where it fails or fewer seconds than it needs are
        left."""
        if self.left < needs:
            self.note(name, outcome="skipped", why=f"{self.left:.0f} s are left, it needs {needs:.0f}")
            return None
        began = time.monotonic()
        self.note(name, outcome="running")
        try:
            found = run()
            if self.device.type == "cuda":
                # errors of kernels come late
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, the other steps go on
            end = traceback.format_exc().rstrip().split("\n")[-LINES:]
            self.note(name, outcome="failed", seconds=time.monotonic() - began, error=repr(error)[:300], traceback=end)
            return None
        self.note(name, outcome="passed", seconds=time.monotonic() - began, found=found)
        return found

    def note(self, name: str, **values: Any) -> None:
        """Puts the outcome of a step on the disk, whatever is known of it."""
        if "seconds" in values:
            values["seconds"] = round(values["seconds"], 3)
        self.outcomes[name] = values
        write_json(self.path, self.outcomes, indent=1)
