"""One way of decoding that is measured, and what it gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from zerodraft.decoding.stats import DecodeStats


@dataclass(frozen=True, slots=True)
class Decoded:
    """New ids of each row, how long they took, the target's passes after the prompt's, and what a decoder of ours
    tells about itself; `asked` says by the step, and row by row, whether a model drafted (a step left out: it did
    not); `depths`, the cycles behind each new token where tokens may leave early."""

    tokens: list[list[int]]
    seconds: float
    passes: int | None = None
    stats: DecodeStats | None = None
    asked: Mapping[int, Sequence[bool]] = field(default_factory=dict)
    depths: list[list[int]] | None = None


@runtime_checkable
class Method(Protocol):
    """One way of decoding.

    `about` says what it is, for the report; `ours` whether it is a decoder of this package; `exact` whether its greedy
    tokens ought to be those of plain decoding.
    """

    @property
    def about(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    @property
    def exact(self) -> bool: ...

    def decode(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Decoded:
        """Continue prompts (`input_ids` and `attention_mask`); `options` are those of `generate`."""
        ...
