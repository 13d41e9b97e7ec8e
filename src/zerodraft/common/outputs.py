"""Files and directories that are written whole or not at all, and leave nothing behind that refuses where a process is
killed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError, reading, writing
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


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, and the folder around it if need be; it is on the disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial, partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def remove_partials(folder: Path) -> None:
    """Removes the files that killed processes left half-written; for who holds the folder. A directory of that name may
    be one that `new_directory` is filling beside them."""
    for leftover in folder.glob(".*.partial"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Writes a JSON file as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


def check_free(output: str | PathLike[str]) -> Path:
    """The place as a path.

    Raises:
        ZerodraftError: it names no directory, there is something else than an empty one, or it cannot be made.
    """
    path = user_path(output)
    if not path.resolve().name or not os.fspath(output):
        raise ZerodraftError(f"'{output}' cannot hold an output: name a new directory")
    with reading(f"'{output}'", "cannot be used"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ZerodraftError(f"'{output}' exists already: name a new directory, or remove it first")
        if closed := closed_parent(path):
            raise ZerodraftError(f"'{output}' cannot be made: '{closed}' takes no new files")
    return path


def closed_parent(path: Path) -> Path | None:
    """The nearest directory above a path that is there, if nothing new can be made in it."""
    nearest = next(parent for parent in path.resolve().parents if parent.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest


def check_file(output: str, flag: str) -> None:
    """For a file that is written at the end of what takes long.

    Raises:
        ZerodraftError: no file of this name can be made; `flag` gave it.
    """
    path = user_path(output)
    if path.is_dir():
        raise ZerodraftError(f"{flag} is '{output}', a directory: name a file")
    if closed := closed_parent(path):
        raise ZerodraftError(f"{flag} is '{output}', but in '{closed}' no file can be made: name another")


@contextmanager
def new_directory(output: str | PathLike[str]) -> Iterator[Path]:
    """A directory beside `output` to write to, which then takes its name; what a killed process left of it is removed.

    Raises:
        ZerodraftError: there is something already, another process is writing it, or the disk is full.
    """
    path = check_free(output).resolve()
    place = path.parent / f".{path.name}.partial"
    with locked(place, f"Another process is writing '{output}'."):
        staging = place / path.name
        try:
            shutil.rmtree(staging, ignore_errors=True)
            with writing(f"'{output}'"):
                staging.mkdir()
                yield staging
                os.replace(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def filled_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled by `fill` if it is not there; of several processes at once the first one's stays, and nobody
    waits. One that is killed leaves a hidden folder behind, which no other takes for its own."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        fill(partial)
        os.replace(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
