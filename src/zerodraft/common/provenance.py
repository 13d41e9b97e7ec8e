"""Where a result comes from: the command, the versions and the machine that made it."""

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """What is needed to make a result again, beside its settings."""
    return {
        "command": shlex.join(command_line()),
        "versions": versions(),
        "machine": {"platform": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def command_line() -> list[str]:
    """The words that started this process."""
    name = Path(sys.argv[0]).name
    return ["zerodraft" if name == "__main__.py" else name, *sys.argv[1:]]


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    packages = {name: version(name) for name in ("zerodraft", "torch", "transformers", "tokenizers")}
    return packages | {"python": platform.python_version()}
