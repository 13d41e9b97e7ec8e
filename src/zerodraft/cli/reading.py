"""Reading a conversation's messages: from a terminal with line editing and history, from a pipe line by line; and
all of standard input."""

import contextlib
import io
import os
import select
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from zerodraft.common.errors import ZerodraftError

HISTORY = "chat_history"
"""The file in the cache directory."""
KEPT = 1000
"""Lines of it."""
PASTED = 0.05
"""Seconds within which a line that follows another was pasted with it."""


class Messages:
    """The messages that a user types, one after another.

    On a terminal a line can be edited and earlier ones found again, where Python has `readline`; lines that are pasted
    at once are one message. From a pipe or a file each line is one.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._typed = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            # a byte that is no character need not end the program
            sys.stdin.reconfigure(errors="replace")
        # the prompt of a line editor goes to stdout, which may be for something else
        self._editor = _editor() if self._typed and console.is_terminal and sys.stdout.isatty() else None
        self._history = _history_file() if self._editor else None
        if self._editor and self._history:
            with contextlib.suppress(OSError):
                self._editor.read_history_file(self._history)
            self._editor.set_history_length(KEPT)

    def next(self) -> str | None:
        """The next message that is not blank; None at the end of the input."""
        while (text := self._lines()) is not None:
            if text.strip():
                self._remember()
                return text
        return None

    def _lines(self) -> str | None:
        line = self._line("> ")
        if line is None or not self._typed:
            return line
        lines = [line]
        while _waits(sys.stdin):
            if (line := self._line("")) is None:
                break
            lines.append(line)
        return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        if self._editor:
            try:
                return input(prompt)
            except EOFError:
                self._console.print()
                return None
        if self._typed:
            self._console.print(Text(prompt, style="bold"), end="")
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def _remember(self) -> None:
        if self._editor and self._history:
            # the history of a conversation is nobody else's to read
            with contextlib.suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
                self._editor.write_history_file(self._history)


def read_stdin() -> str:
    """All of standard input, which is UTF-8 whatever the locale says, without the end of its last line.

    Raises:
        ZerodraftError: it is closed, or no UTF-8.
    """
    if sys.stdin is None:
        raise ZerodraftError("standard input is closed: give the prompt as a word or with --prompt-file")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZerodraftError("Standard input is not UTF-8 text: convert it first.") from error
    return text.removesuffix("\n").removesuffix("\r")


def _editor() -> Any:
    """The line editor, or None where Python was built without one."""
    try:
        import readline
    except ImportError:
        return None
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def _history_file() -> Path | None:
    from zerodraft.models.cache import default_cache_dir

    try:
        return default_cache_dir() / HISTORY
    except ZerodraftError:
        return None


def _waits(stream: Any) -> bool:
    """Whether more was typed already."""
    try:
        return bool(select.select([stream], [], [], PASTED)[0])
    except (OSError, ValueError):
        # not on Windows, where only sockets can be asked
        return False
