"""The kernels' library is compiled once for this machine, under a lock; it is loaded whole or not at all, and only if
nobody else can have written it; without a compiler, or anywhere to keep it, there are no kernels and all goes on."""

import logging
import multiprocessing
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.test_cache import homeless
from zerodraft.fast import library
from zerodraft.fast.compiled import Kernels, kernels
from zerodraft.fast.library import build, compiler_words, own_folder

COMPILER = shutil.which("c++") or shutil.which("g++") or ""
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make files of other users"
)
QUICK = ("-O0", "-std=c++17", "-fPIC", "-fopenmp")
STRANGER = 12345


def built(folder: Path) -> Path:
    """Compiled there, unless it is there; the library's path."""
    assert Kernels(build([COMPILER], QUICK, folder)).lanes == 4
    (path,) = folder.glob("*.so")
    return path


@needs_compiler
def test_compiled_once_and_nothing_else_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zerodraft"):
        assert built(tmp_path) == built(tmp_path)
    assert [record.message for record in caplog.records] == ["compiling kernels for this machine (a few seconds, once)"]
    assert {path.suffix for path in tmp_path.iterdir()} - {".lock"} == {".so", ".sha256"}


@needs_compiler
def test_a_change_of_any_source_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = shutil.copytree(library.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(library, "SOURCES", sources)
    listed = [COMPILER, *QUICK, "-MM", str(sources / "kernels.cpp")]
    read = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split(":")[1].split()
    paths = {Path(word) for word in read if word != "\\"}
    assert paths == set(sources.iterdir())
    first, texts = built(tmp_path / "first"), {tuple(library._sources())}
    for path in paths:
        path.write_text(f"// {path.name}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
        texts.add(tuple(library._sources()))
    assert len(texts) == 1 + len(paths)
    assert built(tmp_path / "second").name != first.name


@needs_compiler
def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=built, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(280)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("*.so"))) == 1


@needs_compiler
def test_what_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        build([COMPILER], (*QUICK, "-include", "no-such-file.h"), tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def put(path: Path, content: bytes) -> None:
    path.unlink()  # this process has the old file loaded and would die of writing into it
    path.write_bytes(content)
    path.chmod(0o755)


def torn(path: Path) -> None:
    put(path, path.read_bytes()[:8192])


def empty(path: Path) -> None:
    put(path, b"")


def another(path: Path) -> None:
    put(path, path.read_bytes() + b"\0")


def gone(path: Path) -> None:
    path.unlink()


def without_checksum(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def with_other_checksum(path: Path) -> None:
    path.with_suffix(".sha256").write_text("0" * 64)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def open_to_others(path: Path) -> None:
    path.chmod(0o777)


def open_to_a_group(path: Path) -> None:
    path.with_suffix(".sha256").chmod(0o664)


DAMAGES = [torn, empty, another, gone, without_checksum, with_other_checksum, a_pipe, open_to_others, open_to_a_group]


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = built(tmp_path)
    damage(path)
    place = path.stat().st_ino if path.exists() else 0
    assert built(tmp_path) == path
    assert path.stat().st_ino != place  # another file: the old one may be in use
    mended = path.stat()
    assert stat.S_IMODE(mended.st_mode) & 0o022 == 0
    assert built(tmp_path).stat().st_ino == mended.st_ino


@needs_compiler
@needs_root
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_a_strangers_file_is_replaced(suffix: str, tmp_path: Path) -> None:
    path = built(tmp_path)
    tmp_path.chmod(0o1777)
    os.chown(path.with_suffix(suffix), STRANGER, STRANGER)
    assert built(tmp_path) == path
    assert path.stat().st_uid == path.with_suffix(".sha256").stat().st_uid == 0
    assert stat.S_IMODE(tmp_path.stat().st_mode) & 0o022 == 0


@needs_root
def test_a_strangers_folder_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    assert own_folder(folder) == folder
    os.chown(folder, STRANGER, STRANGER)
    own = own_folder(folder)
    assert own == tmp_path / "kernels-0"
    assert own.stat().st_uid == 0
    os.chown(own, STRANGER, STRANGER)
    with pytest.raises(OSError, match="belongs to another user"):
        own_folder(folder)


def test_a_folder_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "kernels"
    own_folder(folder)
    folder.chmod(0o777)
    assert own_folder(folder) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_compiler_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chosen, words in (
        ("ccache g++ -O2", ["ccache", "g++", "-O2"]),
        ("g++ -DX='a b'", ["g++", "-DX=a b"]),
        ("no-such-compiler", ["no-such-compiler"]),
        (" g++ ", ["g++"]),
    ):
        monkeypatch.setenv("CXX", chosen)
        assert compiler_words() == words
    place = tmp_path / "my compilers" / "c++"
    place.parent.mkdir()
    place.write_text("#!/bin/sh\n")
    place.chmod(0o755)
    monkeypatch.setenv("CXX", str(place))
    assert compiler_words() == [str(place)]
    for nothing in ("", "  "):
        monkeypatch.setenv("CXX", nothing)
        assert len(compiler_words()) <= 1
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(ValueError, match="quotation"):
        compiler_words()


@needs_compiler
def test_flags_of_the_compiler_are_heeded(tmp_path: Path) -> None:
    build([COMPILER, "-DHARMLESS"], QUICK, tmp_path)
    build([COMPILER], QUICK, tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 2
    with pytest.raises(subprocess.CalledProcessError):
        build([COMPILER, "-include", "no-such-file.h"], QUICK, tmp_path)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


WITHOUT = {
    "switched off": "",
    "no compiler": "",
    "no such compiler": "No such file",
    "a quote that is not closed": "quotation",
    "a compiler that fails": "error: no mercy",
    "a compiler that writes nothing": "No such file",
    "a compiler that writes nonsense": "",
    "a compiler that speaks no UTF-8": "error",
    "nowhere to write": "Not a directory",
    "no home": "ZERODRAFT_CACHE",
}


@pytest.mark.parametrize("why", WITHOUT)
def test_without_kernels(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ZERODRAFT_CACHE", str(tmp_path / "cache"))
    compilers = {
        "no such compiler": "no-such-compiler",
        "a quote that is not closed": "'g++",
        "a compiler that fails": script(
            tmp_path / "fails", "[ $1 = --version ] || { echo 'x: error: no mercy' >&2; exit 1; }"
        ),
        "a compiler that writes nothing": script(tmp_path / "idle", "exit 0"),
        "a compiler that writes nonsense": script(
            tmp_path / "odd", '[ $1 = --version ] || { for last; do :; done; echo nonsense > "$last"; }'
        ),
        "a compiler that speaks no UTF-8": script(tmp_path / "old", "printf 'error \\377' >&2; exit 1"),
    }
    monkeypatch.setenv("CXX", compilers.get(why, ""))
    if why == "switched off":
        monkeypatch.setenv("ZERODRAFT_COMPILE", "0")
    elif why == "no compiler":
        monkeypatch.setattr(library.shutil, "which", lambda name: None)
    elif why == "nowhere to write":
        (tmp_path / "file").touch()
        monkeypatch.setenv("ZERODRAFT_CACHE", str(tmp_path / "file"))
    elif why == "no home":
        monkeypatch.delenv("ZERODRAFT_CACHE")
        homeless(monkeypatch)
    assert kernels.__wrapped__() is None
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == (why not in ("switched off", "no compiler"))
    assert all(WITHOUT[why] in message and "\n" not in message for message in told)
