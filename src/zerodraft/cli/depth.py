"""Text on a terminal whose colour shows how many cycles each token took."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.text import Text

COLOURS = ("bright_cyan", "green", "yellow", "dark_orange", "red", "magenta", "bright_blue", "white")
"""From few cycles to many; deeper tokens than there are colours take the last."""


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of the ids."""
        ...


def colour(depth: int) -> str:
    """Style of a token that ran `depth` cycles; depth 0 (unknown) has none."""
    return COLOURS[min(depth, len(COLOURS)) - 1] if depth > 0 else ""


def legend(depths: Sequence[int]) -> Text:
    """One line: each depth in its colour with its share of the tokens."""
    counts = Counter(depths)
    text = Text("cycles: ")
    for depth in sorted(counts):
        text.append(f"■ {depth}", style=colour(depth))
        text.append(f" {counts[depth]} ({counts[depth] / len(depths):.0%})  ")
    return text


class DepthStreamer:
    """Writes text as its tokens come, each in the colour of its depth; give it to `generate(streamer=...)`.

    A token may be a part of a character: text is held back until it is whole.

    Args:
        console: where to write.
        tokenizer: turns ids into text.
        depth: the depth of the token that has just come, or None to write without colours.
    """

    def __init__(self, console: Console, tokenizer: Decoder, depth: Callable[[], int] | None) -> None:
        self.console, self.tokenizer, self.depth = console, tokenizer, depth
        self._ids: list[int] = []
        self._written = ""
        self._prompt_seen = False

    def put(self, value: "Sequence[int] | object") -> None:
        """Takes the prompt first, then one token a call, as transformers' streamers do."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids += [int(token) for token in value.flatten().tolist()]  # type: ignore[attr-defined]  # a tensor of ids
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        style = colour(self.depth()) if self.depth else ""
        self.console.print(Text(text[len(self._written) :], style=style), end="", soft_wrap=True)
        self._written = text

    def end(self) -> None:
        """Ends the line."""
        rest = self.tokenizer.decode(self._ids, skip_special_tokens=True)[len(self._written) :]
        self.console.print(Text(rest), soft_wrap=True)
