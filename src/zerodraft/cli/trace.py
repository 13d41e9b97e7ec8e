"""The colours of drafting on a terminal: tokens drafted and accepted, drafted and rejected, the target's own.

Where there are no colours, marks say it: {+accepted+}, [-rejected-].
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zerodraft.errors import ZerodraftError

if TYPE_CHECKING:
    from zerodraft.decoding.stats import DecodeStats, RowStep

ACCEPTED, REJECTED, OWN = "green", "dim red strike", "bold cyan"

ROOT = -1
"""The parent of a draft's first tokens (see `decoding.stats`)."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


MARKS = {ACCEPTED: "{{+{}+}}", REJECTED: "[-{}-]", OWN: "{}"}
"""What stands for a colour, as in `git diff --word-diff`."""


def trace(stats: "DecodeStats", tokenizer: Any, *, marked: bool = False) -> Text:
    """The first row's text in colours, or `marked` where there are none; of what was rejected the draft's best path
    stands where it would have been."""
    text, pieces = Text(), TextPieces(tokenizer)
    for row in steps_of(stats):
        accepted = row.tokens[: len(row.accepted)]
        _append(text, "".join(map(pieces.add, accepted)), ACCEPTED, marked)
        if rejected := rejected_path(row):
            _append(text, pieces.peek(rejected), REJECTED, marked)
        _append(text, "".join(map(pieces.add, row.tokens[len(row.accepted) :])), OWN, marked)
    _append(text, pieces.rest(), OWN, marked)
    return text


def _append(text: Text, piece: str, style: str, marked: bool) -> None:
    if piece:
        text.append(MARKS[style].format(piece) if marked else piece, style=style)


def trace_legend(stats: "DecodeStats", *, marked: bool = False) -> Text:
    """One line: each kind in its colour or marks with its number of tokens, alternatives in trees included."""
    rows = steps_of(stats)
    accepted = sum(len(row.accepted) for row in rows)
    counts = {
        ("accepted", ACCEPTED): accepted,
        ("rejected", REJECTED): sum(len(row.drafted) for row in rows) - accepted,
        ("the target's own", OWN): sum(len(row.tokens) - len(row.accepted) for row in rows),
    }
    text = Text()
    for (name, style), count in counts.items():
        if not marked:
            text.append("■ ", style=style.removesuffix(" strike"))
        _append(text, name, style, marked)
        text.append(f" {count}  ")
    text.rstrip()
    return text


def steps_of(stats: "DecodeStats") -> "list[RowStep]":
    """What each pass of the target did for the first row."""
    if stats.trace is None:
        raise ZerodraftError("These statistics have no trace: decode with trace=True.")
    return [row for row in (step.rows[0] for step in stats.trace) if row is not None]


def rejected_path(row: "RowStep") -> list[int]:
    """The tokens that the draft had in mind after the accepted ones: its first path from there."""
    path, node = [], row.accepted[-1] if row.accepted else ROOT
    while node in row.parents:
        node = row.parents.index(node)
        path.append(row.drafted[node])
    return path


class TextPieces:
    """Tokens to text one by one; a token that is a part of a character waits for the rest of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # one token of context stays, since some tokenizers write a token differently at the start of a text
        self._before: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._waiting.append(token)
        text = self._text(self._waiting)
        if text.endswith(REPLACEMENT):
            return ""
        self._before, self._waiting = self._waiting[-1:], []
        return text

    def peek(self, tokens: Sequence[int]) -> str:
        """The text of tokens that are not added."""
        return self._text([*self._waiting, *tokens])

    def rest(self) -> str:
        """What still waits at the end."""
        return self._text(self._waiting) if self._waiting else ""

    def _text(self, tokens: Sequence[int]) -> str:
        known = self._tokenizer.decode(self._before, skip_special_tokens=True)
        return self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=True)[len(known) :]
