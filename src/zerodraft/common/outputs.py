"""Files and directories that are written whole or not at all, and leave nothing behind that refuses where a process is
killed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.common.files import user_path
from zerodraft.common.lock import locked


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which then takes its name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_free(output: str | PathLike[str]) -> Path:
    """The place as a path.

    Raises:
        ZerodraftError: it names no directory, there is something else than an empty one, or it cannot be made.
    """
    path = user_path(output)
    if not path.resolve().name or not os.fspath(output):
        raise ZerodraftError(f"'{output}' is no place for an output: name a new directory")
    with reading(f"'{output}'", "cannot be used"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ZerodraftError(f"'{output}' exists already: name a new directory, or remove it first")
        nearest = next(parent for parent in path.resolve().parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ZerodraftError(f"'{output}' cannot be made: '{nearest}' takes no new files")
    return path


@contextmanager
def new_directory(output: str | PathLike[str]) -> Iterator[Path]:
    """A directory beside `output` to write to, which then takes its name; what a killed process left of it is removed.

    Raises:
        ZerodraftError: there is something already, another process is writing it, or the disk takes no more.
    """
    path = check_free(output).resolve()
    place = path.parent / f".{path.name}.partial"
    with locked(place, f"Another process is writing '{output}'."):
        staging = place / path.name
        try:
            shutil.rmtree(staging, ignore_errors=True)
            with reading(f"'{output}'", "could not be written"):
                staging.mkdir()
                yield staging
                os.replace(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
