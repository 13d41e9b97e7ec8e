"""The `zerodraft` program: finds the command, parses its flags, runs it and turns the outcome into an exit code.

0 done, 1 failed, 2 bad input (one sentence on stderr), 130 interrupted. Text for people goes to stdout; with `--json`
it goes to stderr and the last line of stdout is one JSON object.
"""

import errno
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerodraft.cli.flags import parse
from zerodraft.cli.help import Sketch, command_help, family_help, overview
from zerodraft.common.errors import ZerodraftError, did_you_mean, printable

if TYPE_CHECKING:
    from zerodraft.cli.command import Command

COMMANDS = {
    "pretrain": "Pretrain",
    "finetune": "Finetune",
    "generate": "Generate",
    "chat": "Chat",
    "serve": "Serve",
    "convert": "Convert",
    "info": "Info",
    "calibrate": "Calibrate",
    "eval": "Eval",
    "distill": "Distill",
    "train-drafter": "TrainDrafter",
    "eval-drafter": "EvalDrafter",
    "export-drafter": "ExportDrafter",
    "ngram build": "NgramBuild",
    "ngram words": "NgramWords",
    "ngram info": "NgramInfo",
    "bench decode": "BenchDecode",
    "bench memory": "BenchMemory",
    "bench kernels": "BenchKernels",
    "bench report": "BenchReport",
}
"""Each command lives in the module of its first word, with `_` for `-`."""

HELP = {"-h", "--help", "--help-all"}

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

PLACES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
)  # fmt: skip
"""Errors of the system over a place that cannot be read or written."""


def main(words: Sequence[str] | None = None, prepare: Callable[[], None] = lambda: None) -> int:
    """Runs one command.

    Args:
        words: the command line without the program's name; `sys.argv` by default.
        prepare: called once before a command runs (not for help): the slow imports.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if words is None else words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a path or a text may hold what the terminal's encoding has no sign for
        sys.stdout.reconfigure(errors="backslashreplace")
    as_json = "--json" in words
    try:
        return _dispatch(words, prepare)
    except ZerodraftError as error:
        return _complain(str(error), BAD_INPUT, as_json)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # the reader has gone (`zerodraft ... | head`); keep the interpreter from complaining about it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        place = f"'{error.filename}': " if error.filename else ""
        # where an output goes is input too
        code = BAD_INPUT if error.errno in PLACES else FAILED
        return _complain(f"{place}{error.strerror or error}", code, as_json)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED, as_json)


def _dispatch(words: list[str], prepare: Callable[[], None]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview({name: _sketch(name) for name in COMMANDS}) + "\n")
        return OK
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        sys.stdout.write(f"zerodraft {version('zerodraft')}\n")
        return OK
    family = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if family and set(words[1:2]) <= HELP:
        sys.stdout.write(family_help(words[0], {name: _sketch(name) for name in family}) + "\n")
        return OK if words[1:] else BAD_INPUT
    name, rest = command_of(words)
    if name not in COMMANDS:
        what = "flag" if name.startswith("-") else "command"
        raise ZerodraftError(f"unknown {what} '{name}'{did_you_mean(name, COMMANDS)}")
    cls = _load(name)
    flags = rest[: rest.index("--")] if "--" in rest else rest
    if HELP & set(flags):
        sys.stdout.write(command_help(name, cls, complete="--help-all" in flags) + "\n")
        return OK
    # before anything is imported
    no_bars_in_a_pipe()
    command = parse(cls, rest, name)
    command.check()
    from zerodraft.cli.console import LiteralConsole

    # of several processes (accelerate launch, torchrun) the first one speaks
    first = os.environ.get("RANK", "0") == "0"
    console = LiteralConsole(stderr=command.json, soft_wrap=True, quiet=not first)
    log_to_stderr(logging.INFO if first else logging.WARNING)
    prepare()
    _quiet_transformers()
    result = command.run(console)
    if command.json and first:
        sys.stdout.write(json.dumps(_json_ready(result), allow_nan=False) + "\n")
    return OK


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of a command, of one word or two, and the words after it."""
    length = 2 if any(name.startswith(f"{words[0]} ") for name in COMMANDS) else 1
    return " ".join(words[:length]), list(words[length:])


def _load(name: str) -> "type[Command]":
    return getattr(import_module(f"zerodraft.cli.{_module(name)}"), COMMANDS[name])


def _sketch(name: str) -> Sketch:
    return Sketch.of(Path(__file__).with_name(f"{_module(name)}.py").read_text(encoding="utf-8"), COMMANDS[name])


def _module(name: str) -> str:
    return name.split()[0].replace("-", "_")


def log_to_stderr(level: int) -> None:
    """Our messages from this level on, others' warnings; downloads and other long work report this way."""
    from rich.logging import RichHandler

    from zerodraft.cli.console import LiteralConsole

    handler = RichHandler(console=LiteralConsole(stderr=True), show_path=False, show_time=False, show_level=False)
    # names out of files must not steer the terminal
    handler.addFilter(_make_printable)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("zerodraft").setLevel(level)


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
    return True


def no_bars_in_a_pipe() -> None:
    """Bars of libraries stay away where they would become hundreds of pieces of a line; tqdm reads this when it is
    imported, and so do the processes that are started from here."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _quiet_transformers() -> None:
    """No progress bars for loading a file; a command that takes long has its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _complain(message: str, code: int, as_json: bool) -> int:
    sentence = printable(" ".join(message.split()))
    sys.stderr.write(f"zerodraft: {sentence}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": sentence, "exit_code": code}) + "\n")
    return code


def _json_ready(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    return value
