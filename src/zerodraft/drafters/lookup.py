"""A drafter without a model: what followed the last time when the text was where it is now.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding): find an earlier place where the last few tokens
stood and propose what came after them. Long matches are trusted before short ones, late ones before early ones.
The whole idea is `lookup`, a pure function; the session only keeps the text of each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import NO_TOKEN, Lattice
from zerodraft.decoding.protocols import Progress


def lookup(
    text: Int64[np.ndarray, "n"], length: int, *, max_ngram: int = 3, min_ngram: int = 1, candidates: int = 4
) -> Lattice:
    """Propose the next `length` tokens of `text` from what followed earlier occurrences of its end.

    Args:
        text: Prompt and output so far.
        length: Positions to fill.
        max_ngram: The longest end of the text that is looked for; a longer one tells little more.
        min_ngram: The shortest end that is enough of a match.
        candidates: The most alternatives per position.

    Returns:
        A chain lattice: the first candidates copy what followed the best match (and run on into their own copy where
        it ends, so that a repeating text goes on repeating); the others followed other matches that agree so far. The
        i-th best match weighs 2^-i, hence the best match always leads. Empty where nothing matches.
    """
    starts, _ = matches(text, max_ngram, min_ngram)
    if length < 1 or not len(starts):
        return Lattice.empty()
    # float64 holds 2^-i of 52 matches beside 1; later ones would change nothing
    starts = starts[:52]
    weights = 0.5 ** np.arange(len(starts))
    ids = np.full((length, candidates), NO_TOKEN, np.int64)
    log_q = np.full((length, candidates), -np.inf, np.float32)
    grown = np.concatenate([text, np.empty(length, np.int64)])
    for position in range(length):
        following = grown[starts + position]
        grown[len(text) + position] = following[0]
        if len(starts) == 1:
            ids[position, 0], log_q[position, 0] = following[0], 0.0
            continue
        tokens, first = np.unique(following, return_index=True)
        mass = np.array([weights[following == token].sum() for token in tokens]) / weights.sum()
        order = np.lexsort((first, -mass))[:candidates]
        ids[position, : len(order)] = tokens[order]
        log_q[position, : len(order)] = np.log(mass[order])
        agree = following == following[0]
        starts, weights = starts[agree], weights[agree]
    return Lattice(ids, log_q, chain=True)


def matches(
    text: Int64[np.ndarray, "n"], max_ngram: int, min_ngram: int
) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]]:
    """Where the text went on after earlier occurrences of its end, and how many tokens of it stood there: the longest
    first, then the latest."""
    if len(text) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ends = np.flatnonzero(text[:-1] == text[-1]) + 1
    sizes = np.ones(len(ends), np.int64)
    longer = np.arange(len(ends))
    for size in range(2, max_ngram + 1):
        longer = longer[ends[longer] >= size]
        longer = longer[text[ends[longer] - size] == text[-size]]
        if not len(longer):
            break
        sizes[longer] = size
    ends, sizes = ends[sizes >= min_ngram], sizes[sizes >= min_ngram]
    order = np.lexsort((-ends, -sizes))
    return ends[order], sizes[order]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLookupDrafter:
    """Drafts by `lookup`; fits every target."""

    max_ngram: int = 3
    """The longest end of the text that is looked for."""
    min_ngram: int = 1
    """The shortest match that is drafted from."""
    candidates: int = 4
    """Candidates per position: the copied token and alternatives to it."""
    max_length: int = 32
    """The most positions filled at once."""
    taps: tuple[int, ...] = ()
    """It wants no hidden states."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ZerodraftError(
                f"Prompt lookup with n-grams of {self.min_ngram} to {self.max_ngram} tokens: expected "
                "1 <= min_ngram <= max_ngram."
            )
        if self.candidates < 1 or self.max_length < 1:
            raise ZerodraftError(
                f"Prompt lookup with {self.candidates} candidates and at most {self.max_length} positions: both must "
                "be at least 1."
            )

    def check(self, config: Any) -> None:
        """Copies the target's own tokens, so it fits."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "LookupSession":
        """A session for `batch` rows."""
        return LookupSession(self, batch)


class LookupSession:
    """The text of each row."""

    def __init__(self, drafter: PromptLookupDrafter, batch: int) -> None:
        self.drafter = drafter
        self.texts = [GrowingText() for _ in range(batch)]

    def observe(self, progress: Sequence[Progress]) -> None:
        """Appends the new tokens."""
        for text, news in zip(self.texts, progress, strict=True):
            text.append(news.tokens.cpu().numpy())

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """Looks each row's end up in the row."""
        drafter = self.drafter
        return [
            lookup(
                text.tokens,
                min(length, drafter.max_length),
                max_ngram=drafter.max_ngram,
                min_ngram=drafter.min_ngram,
                candidates=drafter.candidates,
            )
            for text, length in zip(self.texts, lengths, strict=True)
        ]

    def rewind(self, row: int, length: int) -> None:
        """Shortens the text."""
        self.texts[row].cut(length)


class GrowingText:
    """An array that is appended to in place, with room to grow."""

    def __init__(self) -> None:
        self._room = np.empty(256, np.int64)
        self._length = 0

    @property
    def tokens(self) -> Int64[np.ndarray, "n"]:
        """All tokens so far: a view."""
        return self._room[: self._length]

    def append(self, tokens: np.ndarray) -> None:
        """Adds tokens at the end."""
        length = self._length + len(tokens)
        if length > len(self._room):
            self._room = np.concatenate([self.tokens, np.empty(2 * length - self._length, np.int64)])
        self._room[self._length : length] = tokens
        self._length = length

    def cut(self, length: int) -> None:
        """Keeps the first tokens alone."""
        self._length = min(self._length, length)
