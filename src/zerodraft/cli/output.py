"""Writing a model directory whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol, runtime_checkable

from zerodraft.errors import ZerodraftError
from zerodraft.files import user_path


@runtime_checkable
class Savable(Protocol):
    """A model or a tokenizer."""

    def save_pretrained(self, save_directory: Path) -> object:
        """Writes its files into a directory."""
        ...


def check_free(output: str) -> None:
    """Raises unless `output` is a directory that does not exist yet, or an empty one."""
    path = user_path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ZerodraftError(f"'{output}' exists already: name a new directory, or remove it first")


def save_whole(output: str, *parts: Savable) -> None:
    """Saves all parts into a temporary directory beside `output`, then renames it."""
    path = user_path(output).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for part in parts:
            part.save_pretrained(staging)
        # mkdtemp makes it private; a model directory is as readable as any other
        staging.chmod(0o777 & ~_umask())
        os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
