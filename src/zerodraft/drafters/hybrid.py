"""Two drafters in one draft: what the text itself repeats is copied, the rest is the model drafter's.

A small target repeats itself a good deal, and a copy costs nothing. How far a copy can be trusted depends on how long
the text has agreed with the place that it is copied from, and each copied token that turns out right makes the
agreement one longer; so one table, the chance by the length of the agreement, gives the chance of every position of a
copy. The table starts from what was measured on completions of SmolLM2-135M-Instruct and follows the text at hand.

Both drafts go into one tree, ordered by chance (`search.merge`). The model drafter is left out where the copy is so
likely that another pass cannot pay for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from zerodraft.decoding.fallback import UNLIMITED
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Drafter, DraftSession, Progress, Target, join
from zerodraft.drafters.lookup import GrowingText, matches

LEAST_GAIN = 0.15
"""What a pass of the other drafter has to promise beside a copy before it is so much as tried."""
FIRST_RATES = (0.23, 0.58, 0.65, 0.68, 0.74, 0.78, 0.79, 0.85, 0.88, 0.91, 0.93, 0.95)
"""Share of right copies after an agreement of 1, 2, ... tokens (and more than the last)."""


@dataclass(slots=True)
class CopyTrust:
    """How often a copied token was right, by the length of the agreement before it.

    Attributes:
        weight: How many copies the first rates count for.
        keep: Factor by which old copies fade when a new one of the same length is counted.
    """

    weight: float = 12.0
    keep: float = 0.98
    _hits: Float64[np.ndarray, " n"] = field(default_factory=lambda: np.zeros(len(FIRST_RATES)), init=False)
    _tries: Float64[np.ndarray, " n"] = field(default_factory=lambda: np.zeros(len(FIRST_RATES)), init=False)

    def rates(self, agreement: int, count: int) -> Float64[np.ndarray, " k"]:
        """The chance of each of `count` copied tokens, all before it being right."""
        known = (self._hits + self.weight * np.array(FIRST_RATES)) / (self._tries + self.weight)
        return known[np.minimum(np.arange(agreement, agreement + count), len(known)) - 1]

    def learn(self, agreement: int, copied: Int64[np.ndarray, " n"], right: Int64[np.ndarray, " m"]) -> None:
        """Takes note of what stood where a copy was proposed."""
        for place, (proposed, real) in enumerate(zip(copied.tolist(), right.tolist(), strict=False)):
            at = min(agreement + place, len(self._hits)) - 1
            self._hits[at] = self.keep * self._hits[at] + (proposed == real)
            self._tries[at] = self.keep * self._tries[at] + 1
            if proposed != real:
                return


def copy(text: Int64[np.ndarray, " n"], length: int, max_ngram: int) -> tuple[Int64[np.ndarray, " k"], int]:
    """What followed the longest and latest earlier occurrence of the text's end (running on into the copy itself), and
    how many tokens agreed there; empty without one."""
    starts, sizes = matches(text, max_ngram, 1)
    if length < 1 or not len(starts):
        return np.empty(0, np.int64), 0
    start = int(starts[0])
    # a copy that reaches the text's end goes on with its own beginning
    return text[start + np.arange(length) % (len(text) - start)], int(sizes[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridDrafter:
    """Copies from the text, and another drafter's drafts where there is no copy that can be trusted."""

    other: Drafter
    """Drafts what is not copied."""
    max_ngram: int = 12
    """The longest agreement that is looked for."""
    max_length: int = 24
    """The most positions of a copy; the other drafter fills at most its own."""
    least_gain: float | None = None
    """Ask the other drafter where its tokens are expected to add at least this share to those of the copy; None: where
    steps that asked it have brought more tokens per second than steps that did not (`decoding/policy.py`)."""

    @property
    def taps(self) -> Sequence[int]:
        """Those of the other drafter."""
        return self.other.taps

    def check(self, config: Any) -> None:
        """Copies fit every target; the other drafter may not."""
        self.other.check(config)

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "HybridSession":
        """A session for `batch` rows."""
        return HybridSession(self, self.other.start(batch, device, generator), batch)


@dataclass(slots=True)
class _Row:
    text: GrowingText = field(default_factory=GrowingText)
    trust: CopyTrust = field(default_factory=CopyTrust)
    copied: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    agreement: int = 0
    drafted: bool = False
    """The other drafter was asked."""


class HybridSession:
    """The texts, what was copied last, and what the other drafter brings."""

    longest = UNLIMITED
    asked: int | None = None

    def __init__(self, drafter: HybridDrafter, other: DraftSession, batch: int) -> None:
        self.drafter, self.other = drafter, other
        self.rows = [_Row() for _ in range(batch)]
        self.gain = 0.8

    def join(self, target: Target) -> None:
        """The other drafter may draft with it."""
        join(self.other, target)

    def observe(self, progress: Sequence[Progress]) -> None:
        """Tells both, and learns from what became of the last drafts."""
        for row, news in zip(self.rows, progress, strict=True):
            tokens = news.tokens.cpu().numpy()
            if len(tokens):
                row.trust.learn(row.agreement, row.copied, tokens)
                if row.drafted and not (len(row.copied) and row.copied[0] == tokens[0]):
                    self.gain += 0.02 * (len(tokens) - 1 - self.gain)
                row.text.append(tokens)
            # the next step may be plain, and has nothing to teach then
            row.copied, row.drafted = row.copied[:0], False
        self.other.observe(progress)

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """A copy and a draft for each row, side by side, or one of them."""
        self.asked = None
        copies, open_rows = [], []
        for row, length in zip(self.rows, lengths, strict=True):
            row.copied, row.agreement = copy(row.text.tokens, length, self.drafter.max_ngram)
            rates = row.trust.rates(row.agreement, len(row.copied)) if len(row.copied) else np.empty(0)
            copies.append(_chain(row.copied, rates))
            open_rows.append(length > 0 and self._gains(rates))
        if not any(open_rows):
            return copies
        # once: all rows share a pass of the other drafter
        longest = self.drafter.other.max_length
        if self.drafter.least_gain is None:
            longest = min(longest, self.longest)
        asked = [min(length, longest) * is_open for length, is_open in zip(lengths, open_rows, strict=True)]
        for row, positions in zip(self.rows, asked, strict=True):
            row.drafted = positions > 0
        self.asked = max(asked)
        if not self.asked:
            return copies
        drafts = self.other.propose(asked)
        return [_beside(draft, copied) for draft, copied in zip(drafts, copies, strict=True)]

    def rewind(self, row: int, length: int) -> None:
        """Takes back the text, not what was learned from it; both drafters go on with another."""
        one = self.rows[row]
        one.text.cut(length)
        one.copied, one.drafted = one.copied[:0], False
        self.other.rewind(row, length)

    def _gains(self, rates: Float64[np.ndarray, " k"]) -> bool:
        """Whether a copy with these rates leaves enough to gain to ask the other drafter beside it."""
        least = LEAST_GAIN if self.drafter.least_gain is None else self.drafter.least_gain
        return float(1 - rates[:1].sum()) * self.gain >= least * float(1 + rates.cumprod().sum())


def _chain(tokens: Int64[np.ndarray, " k"], rates: Float64[np.ndarray, " k"]) -> Lattice:
    if not len(tokens):
        return Lattice.empty()
    return Lattice(tokens[:, None], np.log(rates)[:, None].astype(np.float32), chain=True)


def _beside(draft: Lattice, copied: Lattice) -> Lattice:
    """Both, the one that begins more surely first."""
    if not len(draft) or not len(copied):
        return draft if len(draft) else copied
    first, second = (draft, copied) if draft.log_q[0, 0] >= copied.log_q[0, 0] else (copied, draft)
    return replace(first, beside=second)
