"""The contract of the program: exit codes, streams, help that fits a screen, and no torch before it is needed."""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from rich.console import Console

from zerodraft.cli import main as program
from zerodraft.cli.command import Command, Result
from zerodraft.cli.flags import flags_of
from zerodraft.cli.help import Sketch
from zerodraft.cli.main import COMMANDS, main
from zerodraft.common.errors import ZerodraftError


@dataclass(frozen=True, kw_only=True, slots=True)
class Echo(Command):
    """Fails in the way that is asked for."""

    example: ClassVar[str] = "zerodraft echo"

    fail: str = ""

    def check(self) -> None:
        if self.fail == "check":
            raise ZerodraftError("told before anything slow")

    def run(self, console: Console) -> Result:
        if self.fail == "input":
            raise ZerodraftError("a sentence\nover two lines")
        if self.fail == "disk":
            raise OSError(28, "No space left on device", "a/b")
        if self.fail == "network":
            raise ConnectionError("the line is dead")
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        logging.getLogger("zerodraft.models.resolve").info("getting something")
        console.print("for people")
        return {"value": 1.5, "nothing": float("nan"), "list": (1, float("inf"))}


@pytest.fixture(autouse=True)
def _with_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    load = program._load
    monkeypatch.setattr(program, "_load", lambda name: Echo if name == "echo" else load(name))
    sketch = program._sketch
    monkeypatch.setattr(program, "_sketch", lambda name: Sketch("", "") if name == "echo" else sketch(name))
    monkeypatch.setitem(program.COMMANDS, "echo", "Echo")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["echo"], 0, ""),
        (["echo", "--fail", "input"], 2, "zerodraft: a sentence over two lines\n"),
        (["echo", "--fail", "check"], 2, "zerodraft: told before anything slow\n"),
        (["echo", "--fail", "disk"], 2, "zerodraft: 'a/b': No space left on device\n"),
        (["echo", "--fail", "network"], 1, "zerodraft: the line is dead\n"),
        (["echo", "--fail", "interrupt"], 130, "zerodraft: interrupted\n"),
        (["echo", "--fial", "x"], 2, "zerodraft: unknown flag '--fial' (did you mean '--fail'?)\n"),
        (["ehco"], 2, "zerodraft: unknown command 'ehco' (did you mean 'echo'?)\n"),
        (["ngram", "biuld"], 2, "zerodraft: unknown command 'ngram biuld' (did you mean 'ngram build'?)\n"),
    ],
)
def test_exit_codes_and_one_line_of_error(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    assert capsys.readouterr().err == message


def test_json_is_the_last_line_of_stdout_and_the_rest_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["echo", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"value": 1.5, "nothing": None, "list": [1, None]}
    assert captured.err == "for people\n"


def test_what_a_command_is_busy_with_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own: with one, the program adds none
    assert main(["echo"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "for people\n"
    assert captured.err.strip() == "getting something"


def test_of_several_processes_only_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv("RANK", "1")
    assert main(["echo"]) == 0
    assert main(["echo", "--json"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["echo", "--fail", "input"]) == 2
    assert capsys.readouterr().err == "zerodraft: a sentence over two lines\n"
    monkeypatch.setenv("RANK", "0")
    assert main(["echo"]) == 0
    assert capsys.readouterr().out == "for people\n"


def test_with_json_an_error_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["echo", "--fail", "input", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"error": "a sentence over two lines", "exit_code": 2}


def test_without_json_people_read_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["echo"]) == 0
    assert capsys.readouterr() == ("for people\n", "")


def test_the_slow_import_happens_only_to_run_a_command() -> None:
    calls: list[int] = []
    for words in ([], ["--help"], ["--version"], ["echo", "--help"], ["echo", "--zzz"], ["echo", "--fail", "check"]):
        main(words, lambda: calls.append(1))
    assert calls == []
    main(["echo"], lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_fits_a_screen_and_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert any(line.startswith(f"example: zerodraft {name} ") for line in lines)
    assert not [flag.name for flag in flags_of(program._load(name)) if not flag.doc]


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_help_all_explains_every_key_of_a_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help-all"]) == 0
    text = capsys.readouterr().out
    for flag in flags_of(program._load(name)):
        assert flag.positional or flag.name in text or flag.both in text


def test_the_model_may_be_called_model_or_target() -> None:
    flags = [flag for name in set(COMMANDS) - {"generate", "echo"} for flag in flags_of(program._load(name))]
    targets = [flag for flag in flags if flag.key == "target"]
    assert len(targets) >= 6
    assert all("model" in flag.also for flag in targets)


def test_the_first_of_two_words_tells_the_second_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: zerodraft bench decode|memory|kernels|report ")
    for name in ("decode", "memory", "kernels", "report"):
        assert f"  bench {name} " in text
    assert main(["bench"]) == 2
    assert capsys.readouterr().out == text


def test_no_words_means_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("words", [[], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_of_the_installed_program_imports_nothing_slow(words: list[str]) -> None:
    slow = {"torch", "transformers", "huggingface_hub", "datasets", "pyarrow", "matplotlib", "accelerate"}
    if not words:
        slow |= {"numpy", "rich", "jaxtyping", "asyncio", "importlib.metadata"}
    code = (
        f"import sys; sys.argv = ['zerodraft', *{words}]; from zerodraft_command import main; code = main(); "
        f"sys.exit(code or ', '.join({slow} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: zerodraft " if words != ["--version"] else "zerodraft ")


def test_the_overview_says_what_the_commands_say() -> None:
    for name in set(COMMANDS) - {"echo"}:
        cls, sketch = program._load(name), program._sketch(name)
        assert sketch.summary == (cls.__doc__ or "").split("\n")[0]
        assert sketch.example == cls.example


def test_there_are_no_bars_in_a_pipe() -> None:
    code = (
        "from zerodraft.cli.main import no_bars_in_a_pipe; no_bars_in_a_pipe(); "
        "from tqdm.auto import tqdm; from transformers.utils.logging import tqdm as theirs; "
        "list(tqdm(range(9))); list(theirs(range(9))); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_flag_that_is_on_is_explained_under_both_its_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text says what it does, so it must not stand under the name alone that switches it off."""
    assert main([*name.split(), "--help-all"]) == 0
    lines = capsys.readouterr().out.split("\n")
    for flag in flags_of(program._load(name)):
        if flag.hint is bool and not flag.positional:
            assert not any(line.split()[:1] == [flag.negation] for line in lines)
            (at,) = (
                at for at, line in enumerate(lines) if line.split()[:1] == [flag.both if flag.default else flag.name]
            )
            if flag.default:
                assert "[on]" in " ".join(lines[at : at + 4])
