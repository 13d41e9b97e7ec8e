"""Directories that are built once: under a lock, in a staging place next to the final one, published by a rename.

A directory counts as built when its `provenance.json` is there and every weight file has the size noted in it. So a
process that is killed half-way leaves only staging leftovers (the next builder removes them), two processes that ask at
once build once, and a truncated file is rebuilt instead of loaded.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"
"""Where a built directory's weights came from; `weights` maps each weight file to its size and sha256."""


def default_cache_dir() -> Path:
    """`$ZERODRAFT_CACHE`, else `zerodraft` in the platform's cache directory.

    Raises:
        ZerodraftError: it is in the home directory, and there is none.
    """
    chosen = os.environ.get("ZERODRAFT_CACHE")
    try:
        return user_path(chosen or user_cache_dir("zerodraft", appauthor=False, opinion=False))
    except (ZerodraftError, RuntimeError) as error:
        raise ZerodraftError(
            f"There is no home directory for the cache ('{chosen or '~'}'): set ZERODRAFT_CACHE to a directory, "
            "written without '~'."
        ) from error


def sha256_of(*paths: Path) -> str:
    """The sha256 of a file, or of several one after another, as hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def is_built(directory: Path) -> bool:
    """Whether `build_once` published `directory` and its weights are still whole (by size: hashing costs a second)."""
    try:
        weights: dict[str, Any] = json.loads((directory / PROVENANCE).read_text("utf-8"))["weights"]
        return all((directory / name).stat().st_size == noted["bytes"] for name, noted in weights.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_once(directory: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Return `directory`, built by `build(staging)` if it is not there yet.

    `build` fills the staging directory and returns its provenance (source, revision, ...); sizes and checksums of the
    safetensors files are added here. Whatever `build` raises leaves nothing behind.
    """
    if is_built(directory):
        return directory
    prefix = f"{directory.name}.staging-"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(directory.parent / f"{directory.name}.lock", directory.name)
    except OSError as error:
        raise ZerodraftError(
            f"The cache directory {directory.parent} cannot be written ({error.strerror or error}): "
            "set ZERODRAFT_CACHE to a directory that can."
        ) from error
    with lock:
        if is_built(directory):  # another process built it while this one waited
            return directory
        # Only the holder of the lock has a staging directory, so any that is here belongs to a process that died.
        for leftover in directory.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = directory.parent / f"{prefix}{os.getpid()}"
        staging.mkdir()
        try:
            provenance = build(staging)
            provenance["weights"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for path in sorted(staging.glob("*.safetensors"))
            }
            (staging / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")
            if directory.exists():
                shutil.rmtree(directory)  # damaged: is_built said no
            staging.rename(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def _locked(path: Path, what: str) -> FileLock:
    """A file lock that is held when this returns; says so if it has to wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is preparing %s; waiting for it", what)
        lock.acquire()
    return lock
