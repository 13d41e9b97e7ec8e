"""A folder or a file that one process writes at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from zerodraft.common.errors import ZerodraftError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """The folder, made if need be, held against other processes. It goes away again if nothing was put into it.

    Raises:
        ZerodraftError: another process holds it (`taken` says what it does), or it cannot be written.
    """
    if not folder.resolve().name or folder == Path():
        raise ZerodraftError(f"'{folder}' cannot hold an output: name another directory.")
    with _held(folder / LOCK, taken, leave=False):
        yield


@contextmanager
def locked_file(path: Path, taken: str) -> Iterator[None]:
    """The same for a file, by another one beside it, in a folder that is made if need be.

    Raises:
        ZerodraftError: another process holds it (`taken` says what it does), or its folder cannot be written.
    """
    path = path.resolve()
    with _held(path.with_name(f"{path.name}{LOCK}"), taken, leave=True):
        yield


@contextmanager
def _held(file: Path, taken: str, *, leave: bool) -> Iterator[None]:
    lock, folder = FileLock(file), file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ZerodraftError(taken) from error
    except OSError as error:
        raise ZerodraftError(f"The directory '{folder}' cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            # while it is held, so that nobody is given a lock on a file that is gone; a folder with more in it stays
            file.unlink()
            if not leave:
                folder.rmdir()
        lock.release()
