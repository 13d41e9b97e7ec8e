"""Text is taken literally wherever it is printed."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from zerodraft.cli.console import LiteralConsole
from zerodraft.cli.trace import Words

HOSTILE = ["[red]x[/red]", "[/b]", ":smile:", "a[0]", "[link=http://x]y[/link]", "\\[b]"]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", HOSTILE)
def test_brackets_and_codes_are_text(text: str, terminal: bool) -> None:
    out = io.StringIO()
    console = LiteralConsole(file=out, force_terminal=terminal, color_system=None, width=80)
    console.print(text)
    console.print(Text(text))
    table = Table(text, title=text, box=None)
    table.add_row(text)
    console.print(table)
    assert out.getvalue().count(text) == 5


def test_control_characters_do_not_reach_a_terminal() -> None:
    hostile = "a\x1b]0;title\x07b\x9b31m\x7f\n\tc"
    out = io.StringIO()
    LiteralConsole(file=out, force_terminal=True, color_system="standard").print(Text(hostile, style="red"))
    shown = out.getvalue()
    assert r"a\x1b]0;title" in shown
    assert r"b\x9b31m\x7f" in shown
    assert shown.count("\x1b") == shown.count("\x1b[")
    assert "\n" in shown
    # what goes into a file is what was written
    out = io.StringIO()
    LiteralConsole(file=out).print(Text("a\x1b[31mb"))
    assert out.getvalue() == "a\x1b[31mb\n"


def written(pieces: list[str], width: int, terminal: bool = True) -> str:
    out = io.StringIO()
    words = Words(LiteralConsole(file=out, force_terminal=terminal, color_system=None, width=width, soft_wrap=True))
    for piece in pieces:
        words.add(Text(piece))
    words.end()
    return out.getvalue()


def test_lines_break_between_words() -> None:
    text = "the quick brown fox jumps over it\nand is away"
    for size in (1, 3, 100):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        lines = written(pieces, 12).split("\n")
        assert [line.rstrip() for line in lines] == ["the quick", "brown fox", "jumps over", "it", "and is away", ""]
        assert written(pieces, 12, terminal=False) == text + "\n"


def test_a_word_longer_than_a_line() -> None:
    assert written(["a ", "x" * 30, " b"], 12).split() == ["a", "x" * 30, "b"]
