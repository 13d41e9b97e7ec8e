"""Directories that are written whole or not at all, whatever stops the process that writes them."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError, writing
from zerodraft.common.lock import locked
from zerodraft.common.outputs import (
    check_free,
    filled_once,
    new_directory,
    new_file,
    remove_partials,
    write_json,
    write_whole,
)

WRITER = """
import sys, time
from zerodraft.common.outputs import new_directory
with new_directory(sys.argv[1]) as folder:
    (folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_it_is_there_whole(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "a/b/c"):
        with new_directory(tmp_path / name) as folder:
            (folder / "file").write_text("x")
            assert not (tmp_path / name / "file").exists()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]
        assert [path.name for path in (tmp_path / name).parent.glob(".*")] == []


def test_what_was_left_half_written_goes_but_not_what_is_being_written(tmp_path: Path) -> None:
    (tmp_path / ".log.json.77.partial").write_text("{")
    with new_directory(tmp_path / "model") as folder:
        (folder / "file").write_text("x")
        remove_partials(tmp_path)
    assert (tmp_path / "model" / "file").read_text() == "x"
    assert not (tmp_path / ".log.json.77.partial").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "a") as folder:
            (folder / "half").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(ZerodraftError, match="could not be written: No space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_ours_is_not_told_as_one_of_the_system(tmp_path: Path) -> None:
    for error in (TypeError("of ours"), RuntimeError("of ours")):
        with pytest.raises(type(error), match="of ours"), new_directory(tmp_path / "a"):
            raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "save",
    [lambda x, path: save_file({"x": x}, path), lambda x, path: torch.save(x, path)],
    ids=["safetensors", "torch"],
)
def test_a_full_disk_is_one_sentence_whoever_writes(save: Callable[[torch.Tensor, Path], None], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel lets no file grow beyond this, as a full disk would
    resource.setrlimit(resource.RLIMIT_FSIZE, (2200, hard))
    try:
        with pytest.raises(ZerodraftError, match=r"^It could not be written: "), writing("It"):
            save(torch.zeros(9000), tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in ("old", "new"):
        with new_file(file) as partial:
            partial.write_text(text)
        assert file.read_text() == text

    def write() -> None:
        with new_file(file) as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "new"


def test_a_killed_process_refuses_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        # while it lives, the place is its own
        with pytest.raises(ZerodraftError, match="Another process is writing"), new_directory(tmp_path / "a"):
            pass
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "a").exists()
    with new_directory(tmp_path / "a") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]


@pytest.mark.parametrize("output", ["", "/", "/dev/null", "/dev/null/x", "x" * 300, "~nobody-of-that-name/x"])
def test_places_for_no_output(output: str) -> None:
    with pytest.raises(ZerodraftError):
        check_free(output)
    for words in (["convert", "nowhere", "--output", output], ["export-drafter", "nowhere", output]):
        assert main(words) == 2


def test_no_run_takes_the_root() -> None:
    for place in (Path("/"), Path()):
        with pytest.raises(ZerodraftError, match="cannot hold an output"), locked(place, "taken"):
            pass


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ZerodraftError), new_directory(output):
            pass
    assert (tmp_path / "file").read_text() == "x"


def test_text_bytes_and_json_are_written_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write_whole(folder / "text", "für\n")
    write_whole(folder / "bytes", b"\xff")
    write_json(folder / "json", {"b": 1, "a": "ü"}, sort_keys=True)
    assert (folder / "text").read_bytes() == "für\n".encode()
    assert (folder / "bytes").read_bytes() == b"\xff"
    assert list(json.loads((folder / "json").read_text()).items()) == [("a", "ü"), ("b", 1)]
    assert sorted(path.name for path in folder.iterdir()) == ["bytes", "json", "text"]


def test_a_folder_is_filled_once_and_the_first_of_several_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "a"

    def fill(partial: Path) -> None:
        (partial / "file").write_text("first")

    def fill_late(partial: Path) -> None:
        filled_once(folder, fill)
        (partial / "file").write_text("second")

    def fail(partial: Path) -> None:
        (partial / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        filled_once(folder, fail)
    assert not folder.exists()
    assert filled_once(folder, fill_late) == folder
    assert filled_once(folder, fail) == folder
    assert (folder / "file").read_text() == "first"
    assert list(folder.parent.iterdir()) == [folder]
