"""`kernels/` as a shared library: compiled once for this machine, loaded only if nobody else can have written it.

The library lies in the cache directory under a name made of the sources, the flags, the compiler and the processor, so
that one directory serves several machines. Beside it lies its checksum: a library that is torn, empty or not the one
that was compiled is compiled anew, as loading it would end the process. A library is code that runs as whoever loads
it, so that neither a file of another user (but root) nor one that others may write to is loaded.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from zerodraft.models.cache import default_cache_dir

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
PATIENCE = 300
"""Seconds until a compiler, or another process that compiles, is given up."""


def compiler_words() -> list[str]:
    """The C++ compiler as the words of a command: what `$CXX` says, flags and all, or the first one at hand; empty if
    there is none.

    Raises:
        ValueError: a quote in `$CXX` that is not closed.
    """
    chosen = os.environ.get("CXX", "").strip()
    if not chosen:
        return [name for name in map(shutil.which, ("c++", "g++", "clang++")) if name][:1]
    # a path is one word, blanks and backslashes included
    return [chosen] if shutil.which(chosen) else shlex.split(chosen)


def build(compiler: Sequence[str], flags: Sequence[str] = FLAGS, folder: Path | None = None) -> ctypes.CDLL:
    """The library from the cache directory (or another folder), compiled if it is not there or not as it was made.

    Args:
        compiler: The words of its command.
        flags: What to compile for.
        folder: Where libraries lie.

    Raises:
        OSError: no such compiler, nowhere to write, or a library that cannot be loaded.
        ValueError: no cache directory.
        subprocess.SubprocessError: the compiler failed.
    """
    folder = own_folder(default_cache_dir() / "kernels" if folder is None else folder)
    parts = (*_sources(), *compiler, *flags, _run([*compiler, "--version"], 60))
    parts += (platform.machine(), _processor())
    path = folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:24]}.so"
    if (library := _load(path)) is not None:
        return library
    with FileLock(path.with_suffix(".lock"), timeout=PATIENCE):
        library = _load(path)
        if library is None:  # nor has another process compiled it while this one waited
            if path.exists():
                logger.warning("%s is not what was compiled here, or another user can write to it: made anew", path)
            logger.info("compiling kernels for this machine (a few seconds, once)")
            _compile(compiler, flags, path)
            library = _load(path)
    if library is None:
        raise OSError(f"{path} cannot be kept from being written by other users")
    return library


def own_folder(folder: Path) -> Path:
    """A folder in which only this user (or root) can put libraries: this one, made or closed to others if need be, or
    one with the user's number in its name if this one is somebody else's.

    Raises:
        OSError: it cannot be made, or both are somebody else's.
    """
    for place in (folder, folder.with_name(f"{folder.name}-{_user()}")):
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        status = place.stat()
        if status.st_uid == _user():
            place.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
            return place
        if _is_private(status):
            return place
    raise OSError(f"{place} belongs to another user")


def _sources() -> list[str]:
    """What the compiler reads: each file's name and text."""
    paths = sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))
    return [part for path in paths for part in (path.name, path.read_text(encoding="utf-8"))]


def _user() -> int:
    """This user's number; where the system has none, 0, as files have there."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _is_private(status: os.stat_result) -> bool:
    """Whether this user and root alone can have written a file or put something into a directory."""
    ours = status.st_uid in (0, _user()) and (os.name != "posix" or not status.st_mode & 0o022)
    return ours and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def _load(path: Path) -> ctypes.CDLL | None:
    """The library at a path if it is whole and private."""
    try:
        with _opened(path) as file, _opened(_checksum_of(path)) as noted:
            if not all(_is_private(os.fstat(opened.fileno())) for opened in (file, noted)):
                return None
            if hashlib.sha256(file.read()).hexdigest().encode() != noted.read():
                return None
    except OSError:  # not there, or closed to this user
        return None
    return ctypes.CDLL(str(path))


def _opened(path: Path) -> BinaryIO:
    """A file, not waited for if it is a pipe."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def _checksum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compile(compiler: Sequence[str], flags: Sequence[str], path: Path) -> None:
    """Compile to another name first. OpenMP is not linked: its functions are those that torch has loaded, so that both
    share one team of threads; two would wait for each other."""
    unit, partial, noted = (path.with_suffix(suffix) for suffix in (".o", ".partial", ".noted"))
    try:
        _run([*compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", str(unit)], PATIENCE)
        _run([*compiler, "-shared", str(unit), "-o", str(partial)], PATIENCE)
        partial.chmod(0o755)
        noted.write_text(hashlib.sha256(partial.read_bytes()).hexdigest(), encoding="utf-8")
        noted.chmod(0o644)
        # a process that dies in between leaves a library without its checksum, which is none
        _checksum_of(path).unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(noted, _checksum_of(path))
    finally:
        for left in (unit, partial, noted):
            left.unlink(missing_ok=True)


def _run(command: Sequence[str], patience: float) -> str:
    """What a command prints."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=patience,
    )
    return done.stdout


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return platform.processor()
    return "|".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
