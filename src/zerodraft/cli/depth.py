"""The colours of depth on a terminal: how many cycles each token took."""

from collections import Counter
from collections.abc import Sequence

from rich.text import Text

COLOURS = ("bright_cyan", "green", "yellow", "dark_orange", "red", "magenta", "bright_blue", "white")
"""From few cycles to many; deeper tokens than there are colours take the last."""


def colour(depth: int) -> str:
    """Style of a token that ran `depth` cycles (from 1)."""
    return COLOURS[min(depth, len(COLOURS)) - 1]


def legend(depths: Sequence[int]) -> Text:
    """One line: each depth in its colour with its number of tokens and their share."""
    counts = Counter(depths)
    text = Text("cycles: ")
    for depth in sorted(counts):
        text.append(f"■ {depth}", style=colour(depth))
        text.append(f" {counts[depth]} ({counts[depth] / len(depths):.0%})  ")
    text.rstrip()
    return text
