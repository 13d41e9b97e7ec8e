"""`build_once`: built once by concurrent processes; whole or not there after a failure, a kill or a truncation."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.cache import build_once, default_cache_dir, is_built

# A builder in a process of its own: notes that it ran, takes its time, writes one "weight" file.
BUILDER = """
import sys, time
from pathlib import Path
from zerodraft.models.cache import build_once
directory, seconds = Path(sys.argv[1]), float(sys.argv[2])
def build(staging):
    with (directory.parent / "builds.txt").open("a") as file:
        file.write("built\\n")
    (staging / "model.safetensors").write_bytes(b"x" * 10)
    time.sleep(seconds)
    return {"source": "test"}
build_once(directory, build)
"""

PATIENCE = 280.0
"""Seconds within which a child process starts on the slowest machine; passed only when something hangs."""


@contextmanager
def builders(number: int, directory: Path, seconds: float) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that build `directory`; none of them outlives the test."""
    command = [sys.executable, "-c", BUILDER, str(directory), str(seconds)]
    started = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield started
    finally:
        for builder in started:
            builder.kill()
            builder.wait()


def write_weights(staging: Path) -> dict[str, Any]:
    (staging / "model.safetensors").write_bytes(b"weights")
    return {"source": "test"}


def test_second_call_finds_the_first(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    assert build_once(directory, write_weights) == directory
    assert is_built(directory)

    def fail(_: Path) -> dict[str, Any]:
        raise AssertionError("built twice")

    assert build_once(directory, fail) == directory
    assert sorted(path.name for path in directory.iterdir()) == ["model.safetensors", "provenance.json"]


def test_two_processes_build_once(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    with builders(2, directory, 0.5) as started:
        assert [builder.wait(PATIENCE) for builder in started] == [0, 0]
    assert is_built(directory)
    assert (tmp_path / "builds.txt").read_text() == "built\n"


def test_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    with builders(1, directory, 600):
        deadline = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("model.staging-*/model.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not is_built(directory)
    build_once(directory, write_weights)
    assert is_built(directory)
    assert not list(tmp_path.glob("*.staging-*"))


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(staging: Path) -> dict[str, Any]:
        (staging / "half.safetensors").write_bytes(b"half")
        raise ZerodraftError("no.")

    with pytest.raises(ZerodraftError, match="no"):
        build_once(tmp_path / "model", fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
def test_damaged_directory_is_rebuilt(tmp_path: Path, damage: str) -> None:
    directory = build_once(tmp_path / "model", write_weights)
    if damage == "truncate":
        (directory / "model.safetensors").write_bytes(b"wei")
    elif damage == "remove":
        (directory / "model.safetensors").unlink()
    else:
        (directory / "provenance.json").write_text("{")
    assert not is_built(directory)
    build_once(directory, write_weights)
    assert is_built(directory)
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_unwritable_cache_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ZerodraftError, match="set ZERODRAFT_CACHE"):
        build_once(tmp_path / "file" / "model", write_weights)


def test_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ZERODRAFT_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    if sys.platform == "linux":
        monkeypatch.setenv("ZERODRAFT_CACHE", "~/mine")
        assert default_cache_dir() == tmp_path / "mine"
        monkeypatch.delenv("ZERODRAFT_CACHE")
        assert default_cache_dir() == tmp_path / "xdg" / "zerodraft"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_cache_dir() == tmp_path / ".cache" / "zerodraft"


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry: no variable names a home, and no one is known."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.skipif(sys.platform == "win32", reason="users are in pwd elsewhere only")
@pytest.mark.parametrize("chosen", ["", "~/mine"])
def test_without_a_home_the_message_says_what_to_set(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    homeless(monkeypatch)
    monkeypatch.setenv("ZERODRAFT_CACHE", chosen)
    with pytest.raises(ZerodraftError, match=r"There is no home directory .*set ZERODRAFT_CACHE"):
        default_cache_dir()
