"""Counting n-grams and smoothing them: from token streams to an `NgramTable`.

Interpolated Kneser-Ney with three discounts (Chen and Goodman, 1999). The highest order is counted as it is; a lower
one by in how many different contexts its n-gram was seen, since it is asked for only where the longer context fails:

    p(c | h) = (count(h c) - D(count(h c))) / sum of counts after h + gamma(h) p(c | h')

with D by count 1, 2, 3 and more, estimated from the counts of counts, gamma what makes the sum over c equal one, and
one over the vocabulary below order 1: every token has a probability.

Counting is in numpy, a chunk of tokens at a time, so memory grows with the number of different n-grams and not with
the text. No n-gram goes across the border of two documents.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Integer

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.ngram import Level, NgramTable, index_keys

SMOOTHING = "interpolated Kneser-Ney, three discounts for each order (Chen and Goodman, 1999)"
CHUNK = 1 << 22
"""Tokens that are counted at a time."""
LONGEST = 6
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where the text is too small to estimate them."""

Documents = Iterable[Integer[np.ndarray, " _"]]
OnProgress = Callable[[str, int], None]


def build_table(
    documents: Documents,
    vocab_size: int,
    *,
    order: int = 3,
    min_count: int = 1,
    about: dict[str, Any] | None = None,
    on_progress: OnProgress = lambda stage, tokens: None,
    chunk: int = CHUNK,
) -> NgramTable:
    """Counts the n-grams of all documents and smooths them.

    Args:
        documents: Token ids, an array a document; gone through several times, so no generator.
        vocab_size: Tokens 0 to vocab_size - 1 get a probability, seen or not.
        order: The n of the longest n-grams.
        min_count: Of the highest order, keep what was seen this often (for a smaller table).
        about: Goes into the table's header: where the tokens come from.
        on_progress: Called with the stage (`2-grams`) and the number of tokens it has gone through.
        chunk: Tokens counted at a time. A longer document is cut.

    Raises:
        ZerodraftError: No tokens, tokens beyond the vocabulary, or an order that makes no sense.
    """
    if not 1 <= order <= LONGEST:
        raise ZerodraftError(f"The order of an n-gram table is {order}; give one from 1 to {LONGEST}.")
    if min_count < 1:
        raise ZerodraftError(f"min_count is {min_count}; give at least 1.")
    if vocab_size < 1:
        raise ZerodraftError(f"The vocabulary has {vocab_size} tokens; it must have at least 1.")
    streams = _Streams(documents, vocab_size, chunk, on_progress)
    keys: list[Int64[np.ndarray, " n"]] = [np.arange(vocab_size)]
    counts: list[Int64[np.ndarray, " n"]] = []
    for n in range(1, order + 1):
        if n > 1:
            found, occurrences = _distinct(streams.grams(keys, n, f"{n}-grams"))
            keys.append(found)
        else:
            found = keys[0]
            occurrences = streams.count_tokens()
        if n < order:
            # one number for a left neighbour (or the document's start) and an n-gram
            left, _ = _distinct(streams.left_neighbours(keys, n, f"contexts of {n}-grams"))
            occurrences = np.bincount(left // (vocab_size + 1), minlength=len(found))
        counts.append(occurrences)
    return _smooth(keys, counts, vocab_size, min_count, {"tokens": streams.tokens, **(about or {})})


class _Streams:
    """The documents as one array a chunk, with a start token (`vocab_size`) before each document."""

    def __init__(self, documents: Documents, vocab_size: int, chunk: int, on_progress: OnProgress) -> None:
        self.documents, self.vocab_size, self.chunk, self.on_progress = documents, vocab_size, chunk, on_progress
        self.tokens = 0

    def chunks(self, stage: str) -> Iterator[Int64[np.ndarray, " n"]]:
        start = np.array([self.vocab_size])
        parts: list[np.ndarray] = []
        held = done = 0
        for document in self.documents:
            for at in range(0, len(document), self.chunk):
                piece = np.asarray(document[at : at + self.chunk], np.int64)
                self._check(piece)
                parts += [start, piece]
                held += len(piece)
                done += len(piece)
                if held >= self.chunk:
                    yield np.concatenate(parts)
                    self.on_progress(stage, done)
                    parts, held = [], 0
        if parts:
            yield np.concatenate(parts)
        self.on_progress(stage, done)

    def _check(self, tokens: np.ndarray) -> None:
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < self.vocab_size:
                raise ZerodraftError(
                    f"The text has token {token}, but the vocabulary only tokens 0 to {self.vocab_size - 1}: name the "
                    "target that it was tokenised for."
                )

    def count_tokens(self) -> Int64[np.ndarray, " v"]:
        counts = np.zeros(self.vocab_size + 1, np.int64)
        for chunk in self.chunks("tokens"):
            counts += np.bincount(chunk, minlength=self.vocab_size + 1)
        self.tokens = int(counts[:-1].sum())
        if not self.tokens:
            raise ZerodraftError("There is nothing to count: the files hold no tokens.")
        return counts[:-1]

    def grams(self, keys: list[np.ndarray], n: int, stage: str) -> Iterator[np.ndarray]:
        """The keys of all n-grams; `keys` are those of the orders below."""
        for chunk in self.chunks(stage):
            yield self._keys(chunk, self._index(chunk, keys[: n - 1]), n)[1]

    def left_neighbours(self, keys: list[np.ndarray], n: int, stage: str) -> Iterator[np.ndarray]:
        """For every n-gram, its index and the token before it as one number."""
        for chunk in self.chunks(stage):
            index = self._index(chunk, keys[:n])
            (at,) = np.nonzero(index >= 0)
            yield index[at] * (self.vocab_size + 1) + chunk[at - 1]

    def _index(self, chunk: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        """The index of the n-gram that begins at each place, n being the number of `keys`; -1 where there is none."""
        index = np.where(chunk == self.vocab_size, -1, chunk)
        for n in range(2, len(keys) + 1):
            at, grams = self._keys(chunk, index, n)
            index = np.full(len(chunk), -1)
            index[at] = keys[n - 1].searchsorted(grams)
        return index

    def _keys(self, chunk: np.ndarray, index: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Where n-grams begin, and their keys, given the index of the (n-1)-gram at each place."""
        last = chunk[n - 1 :]
        (at,) = np.nonzero((index[: len(last)] >= 0) & (last != self.vocab_size))
        return at, index[at] * self.vocab_size + last[at]


def _distinct(parts: Iterable[np.ndarray]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Different numbers, sorted, and how often each occurs.

    Results are merged with those of like size, as in a merge sort, so that each number is moved a few times only.
    """
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts:
        run = np.unique(part, return_counts=True)
        while runs and len(runs[-1][0]) <= 2 * len(run[0]):
            run = _merge(runs.pop(), run)
        runs.append(run)
    merged = np.empty(0, np.int64), np.empty(0, np.int64)
    while runs:
        merged = _merge(runs.pop(), merged)
    return merged


def _merge(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    keys, counts = (np.concatenate(both) for both in zip(one, two, strict=True))
    if not len(keys):
        return keys, counts
    # stable: merging two sorted runs is linear
    order = keys.argsort(kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts, first)


def _smooth(
    keys: list[np.ndarray], counts: list[np.ndarray], vocab_size: int, min_count: int, about: dict[str, Any]
) -> NgramTable:
    """Probabilities and back-off weights from keys and counts, order by order from below."""
    order = len(keys)
    log_p: list[np.ndarray] = []
    backoff: list[np.ndarray] = []
    discounts = [_discounts(count) for count in counts]
    p_lower, suffix = np.full(1, 1 / vocab_size), np.zeros(vocab_size, np.int64)
    for n, (count, D) in enumerate(zip(counts, discounts, strict=True), 1):
        context, last = np.divmod(keys[n - 1], vocab_size)
        # where the n-gram without its first token is, one order below
        if n == 2:
            suffix = last
        elif n > 2:
            suffix = keys[n - 2].searchsorted(suffix[context] * vocab_size + last)
        if n == 1:
            context = np.zeros_like(context)
        contexts = len(p_lower) if n == 1 else len(keys[n - 2])
        total = np.bincount(context, count, contexts)
        if n == order and n > 1 and min_count > 1:
            keep = count >= min_count
            keys[n - 1], context, suffix, count = (x[keep] for x in (keys[n - 1], context, suffix, count))
        kept = count - D[np.minimum(count, 3)]
        left = total - np.bincount(context, kept, contexts)
        gamma = np.divide(left, total, out=np.ones(contexts), where=total > 0)
        p_lower = kept / total[context] + gamma[context] * p_lower[suffix]
        log_p.append(np.minimum(np.log(p_lower), 0).astype("<f4"))
        if n > 1:
            backoff.append(np.minimum(np.log(gamma), 0).astype("<f4"))
    if order == 1:
        backoff.append(np.zeros(vocab_size, "<f4"))
    levels, place = [], np.arange(vocab_size)
    for n in range(2, order + 1):
        # tables are in the order of hashes: contexts have moved
        context, last = np.divmod(keys[n - 1], vocab_size)
        moved = place[context] * vocab_size + last
        to, start, bitmap = index_keys(moved)
        place = np.empty_like(to)
        place[to] = np.arange(len(to))
        levels.append(
            Level(
                keys=moved[to].astype("<u4" if len(keys[n - 2]) * vocab_size <= 2**32 else "<i8"),
                log_p=log_p[n - 1][to],
                backoff=backoff[n - 1][to] if n < order else None,
                start=start,
                bitmap=bitmap,
                depth=max(1, int(np.diff(start).max())),
            )
        )
    about = {"smoothing": SMOOTHING, "discounts": [D[1:].round(4).tolist() for D in discounts], **about}
    return NgramTable(log_p[0], backoff[0], tuple(levels), about)


def _discounts(counts: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, "4"]:
    """What is taken off a count of 0, 1, 2, and 3 or more."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    estimates = np.array(FALLBACK)
    if (n[1:5] > 0).all():
        y = n[1] / (n[1] + 2 * n[2])
        found = np.array([k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)])
        if (found > 0).all():
            estimates = found
    return np.concatenate([[0.0], estimates])
