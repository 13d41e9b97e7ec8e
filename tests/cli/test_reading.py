"""A conversation on a real (pseudo-)terminal: editing, history, pasted lines, how it ends."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_chat import chat_dir  # noqa: F401  # a fixture

pty = pytest.importorskip("pty")
pytest.importorskip("readline")

UP, PASTE, PASTED, END = "\x1b[A", "\x1b[200~", "\x1b[201~", "\x04"
HARNESS = """
import json, sys
from rich.console import Console
from zerodraft.cli.reading import Messages
typed = Messages(Console())
while (message := typed.next()) is not None:
    print(json.dumps(message), flush=True)
print("over", flush=True)
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, words: list[str], cache: Path) -> None:
        self.ours, theirs = pty.openpty()
        environment = {
            **os.environ,
            "ZERODRAFT_CACHE": str(cache),
            "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.shown = ""

    def until(self, text: str, seconds: float = 60.0) -> str:
        """What is shown up to where this text comes, which is then forgotten."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 0.5)[0]:
                self.shown += os.read(self.ours, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.ours)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    found = Terminal([sys.executable, "-c", HARNESS], tmp_path)
    yield found
    assert found.close() == 0
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0


def test_lines_are_edited_and_found_again(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type("the cap\x7ft\n")
    terminal.until(json.dumps("the cat"))
    terminal.until("> ")
    terminal.type(f"{UP}s\n")
    terminal.until(json.dumps("the cats"))
    terminal.until("> ")
    terminal.type("\n")
    terminal.until("> ")
    terminal.type("[/b] /etc/hosts \N{SNOWMAN}\n")
    terminal.until(json.dumps("[/b] /etc/hosts \N{SNOWMAN}"))
    terminal.until("> ")
    terminal.type(END)
    terminal.until("over")


def test_pasted_lines_are_one_message(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.type(f"{PASTE}def f():\n    return 1{PASTED}\n")
    terminal.until(json.dumps("def f():\n    return 1"))
    terminal.until("> ")
    # a terminal that does not tell what was pasted
    terminal.type("one\ntwo\n\nthree\n")
    terminal.until(json.dumps("one\ntwo\n\nthree"))
    terminal.until("> ")
    terminal.type(END)
    terminal.until("over")


def test_the_command_itself(chat_dir: Path, tmp_path: Path) -> None:  # noqa: F811  # the fixture
    words = ["chat", "--target", str(chat_dir), "--drafter", "lookup", "--max-new-tokens", "4"]
    terminal = Terminal([sys.executable, "-m", "zerodraft", *words], tmp_path)
    for message in ("the cat", "/etc/hosts", UP):
        terminal.until("> ")
        terminal.type(f"{message}\n")
        terminal.until("tokens/s")
    terminal.until("> ")
    terminal.type("/nothing\n")
    terminal.until("is not a command")
    terminal.until("> ")
    terminal.type("/quit\n")
    assert terminal.close() == 0
    assert (tmp_path / "chat_history").read_text().splitlines()[:2] == ["the cat", "/etc/hosts"]
