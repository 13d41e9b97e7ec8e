"""Progress: one line that moves on a terminal, lines now and then elsewhere."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from zerodraft.cli import progress as shown
from zerodraft.cli.progress import LiveProgress


def output(terminal: bool) -> str:
    file = io.StringIO()
    with LiveProgress(Console(file=file, force_terminal=terminal, width=120)) as progress:
        for done in (1, 2, 3):
            progress.show("measuring", done, 4)
        progress.count("reading", 1234567)
    return file.getvalue()


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 29.0, 31.0, 32.0, 62.0])
    monkeypatch.setattr(shown, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert output(terminal=False) == "measuring: 2 of 4\nreading: 1,234,567 tokens\n"


def test_a_terminal_gets_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # on a dumb one no line can move
    text = output(terminal=True)
    assert "reading: 1,234,567 tokens" in text
    assert "2 of 4" not in text
    assert text.endswith("\x1b[2K")
