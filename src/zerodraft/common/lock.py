"""A folder that one process writes at a time."""

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
        raise ZerodraftError(f"'{folder}' cannot hold an output: name a directory of its own.")
    lock = FileLock(folder / LOCK)
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
            (folder / LOCK).unlink()
            folder.rmdir()
        lock.release()
