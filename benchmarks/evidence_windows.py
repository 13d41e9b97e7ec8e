"""What `windows.py` found, and the section of the page that is written from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from evidence_table import Beside
from evidence_text import grid
from zerodraft.ztt.compare import Interval

HEAD = """## Windows

Which layers of a pretrained model may run twice before anything is trained: the loss over that of the model itself,
where a window of layers runs a second time behind gates, `h + g * (layer(h) - h)`. Intervals are a bootstrap over
blocks of text.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Some neighbouring layers, run twice."""

    first: int
    """Layers before them."""
    layers: int
    gate: float
    """Of their second run: 1 is the whole of it, 0 none."""
    increase: dict[str, Interval]
    """By text: the loss over that of the model itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowTable(Beside):
    """All windows of the model that the runs of a plan begin with, on their text."""

    benchmark: ClassVar[str] = "windows"
    script: ClassVar[str] = "windows.py"

    start: str
    """The model."""
    losses: dict[str, float]
    """Its own, by text."""
    results: tuple[Window, ...]


def section(found: WindowTable) -> Iterator[str]:
    """Everything about one model, best windows first."""
    yield f"### Windows of {found.start}\n"
    losses = ", ".join(f"{loss:.4f} on {text}" for text, loss in found.losses.items())
    yield f"From `{found.provenance.get('command', '-')}`. Its own loss: {losses}.\n"
    texts = list(found.losses)
    ordered = sorted(found.results, key=lambda window: sum(one.mean for one in window.increase.values()))
    rows = [
        [
            f"{window.first + 1} to {window.first + window.layers}",
            f"{window.gate:g}",
            *(str(window.increase[text]) for text in texts),
        ]
        for window in ordered
    ]
    yield grid(["layers run twice", "gate", *(f"{text} loss" for text in texts)], rows)
