"""The colours of drafting on a terminal: tokens drafted and accepted, drafted and rejected, the target's own.

Where there are no colours, marks say it: {+accepted+}, [-rejected-].
"""

import re
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.pieces import TextPieces

if TYPE_CHECKING:
    from zerodraft.decoding.stats import DecodeStats, RowStep
    from zerodraft.generate.huggingface import DiffuSpec

ACCEPTED, REJECTED, OWN = "green", "dim red strike", "bold cyan"

ROOT = -1
"""The parent of a draft's first tokens (see `decoding.stats`)."""

MARKS = {ACCEPTED: "{{+{}+}}", REJECTED: "[-{}-]", OWN: "{}"}
"""What stands for a colour, as in `git diff --word-diff`."""


class Tracer:
    """One step of the first row after another, to text in colours, or `marked` where there are none; of what was
    rejected the draft's best path stands where it would have been."""

    def __init__(self, tokenizer: Any, *, marked: bool = False) -> None:
        self._pieces, self._marked = TextPieces(tokenizer), marked

    def step(self, row: "RowStep") -> Text:
        """What a step brought, and what was struck."""
        text = Text()
        accepted = row.tokens[: len(row.accepted)]
        _append(text, "".join(map(self._pieces.add, accepted)), ACCEPTED, self._marked)
        if rejected := rejected_path(row):
            _append(text, self._pieces.peek(rejected), REJECTED, self._marked)
        _append(text, "".join(map(self._pieces.add, row.tokens[len(row.accepted) :])), OWN, self._marked)
        return text

    def rest(self) -> Text:
        """What still waits at the end."""
        text = Text()
        _append(text, self._pieces.rest(), OWN, self._marked)
        return text


def trace(stats: "DecodeStats", tokenizer: Any, *, marked: bool = False) -> Text:
    """The first row's text as `Tracer` shows it."""
    tracer = Tracer(tokenizer, marked=marked)
    return Text().join([*map(tracer.step, steps_of(stats)), tracer.rest()])


class TraceStreamer:
    """A streamer for `generate` that prints each step of a decoder with `trace=True` as soon as it is made."""

    def __init__(self, console: Console, tokenizer: Any, decode: "DiffuSpec") -> None:
        self._tracer = Tracer(tokenizer, marked=console.color_system is None)
        self._words, self._decode = Words(console), decode
        self._steps: int | None = None

    def put(self, tokens: Any) -> None:
        """The prompt comes first; then the decoder has the steps."""
        if self._steps is None:
            self._steps = 0
            return
        stats = self._decode.last_stats
        assert stats is not None
        rows = steps_of(stats)
        for row in rows[self._steps :]:
            self._words.add(self._tracer.step(row))
        self._steps = len(rows)

    def end(self) -> None:
        """The last word, and the end of the line."""
        self._words.add(self._tracer.rest())
        self._words.end()


class Words:
    """Prints text as it comes, on a terminal word by word, so that lines break between words."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        self._word = Text()

    def add(self, text: Text) -> None:
        """More text; a word waits for its end."""
        if not self._console.is_terminal:
            self._console.print(text, end="")
            return
        at = 0
        for found in re.finditer(r"\s", text.plain):
            self._word.append_text(text[at : found.start()])
            self._flush()
            self._space(found[0])
            at = found.end()
        self._word.append_text(text[at:])

    def end(self) -> None:
        """The last word and the line's end."""
        self._flush()
        self._console.print()
        self._column = 0

    def _flush(self) -> None:
        width, self._word, word = self._word.cell_len, Text(), self._word
        if self._column and self._column + width > self._console.width:
            self._console.print()
            self._column = 0
        self._console.print(word, end="")
        self._column = (self._column + width) % self._console.width

    def _space(self, space: str) -> None:
        if space == "\n" or self._column + 1 >= self._console.width:
            self._console.print()
            self._column = 0
        else:
            self._console.print(Text(space), end="")
            self._column += 1


def _append(text: Text, piece: str, style: str, marked: bool) -> None:
    if piece:
        text.append(MARKS[style].format(piece) if marked else piece, style=style)


def trace_legend(stats: "DecodeStats", *, marked: bool = False) -> Text:
    """One line: each kind in its colour or marks with its number of tokens, and how many of a tree's alternatives are
    not shown."""
    rows = steps_of(stats)
    accepted = sum(len(row.accepted) for row in rows)
    struck = sum(len(rejected_path(row)) for row in rows)
    counts = {
        ("accepted", ACCEPTED): accepted,
        ("rejected", REJECTED): struck,
        ("the target's own", OWN): sum(len(row.tokens) - len(row.accepted) for row in rows),
    }
    text = Text()
    for (name, style), count in counts.items():
        if not marked:
            text.append("■ ", style=style.removesuffix(" strike"))
        _append(text, name, style, marked)
        text.append(f" {count}  ")
    if others := sum(len(row.drafted) for row in rows) - accepted - struck:
        text.append(f"and {others} alternatives to them, not shown")
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
