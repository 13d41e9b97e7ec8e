"""A token n-gram model in one memory-mapped file: the format, and looking probabilities up.

The model is that of Kneser and Ney (1995) in the interpolated form with three discounts of Chen and Goodman (1999);
`ngram_build` makes it. What is stored is its back-off form: a seen n-gram has its own log-probability, an unseen one
gets the back-off weight of its context times the probability after the context without its first token:

    log p(c | h) = log_p[h c]                    if h c was seen
                 = backoff[h] + log p(c | h')    else, with h' = h without its first token, backoff 0 if h was not seen

Each order is one array of keys, `index of the n-gram without its last token * vocabulary + last token`, beside its
log-probabilities and back-off weights. Most n-grams that a search asks for were never seen: a bitmap of hashed keys
says so for nearly all of them. The keys are in the order of their hashes, so the rest is found by looking at a few
neighbours (one miss of the processor's cache, where a binary search has ten).

File: magic, version, lengths and checksum (`PREAMBLE`), a header in JSON that names the arrays, then the arrays, each
at a multiple of 64 bytes. Little-endian. Logarithms are natural. Nothing in the body can lead a lookup out of bounds.
"""

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt8, UInt32, UInt64

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import check_regular, user_path
from zerodraft.common.outputs import new_file
from zerodraft.decoding.lattice import NO_TOKEN
from zerodraft.decoding.scorers import LatticeScores

MAGIC = b"ZDNGRAM\n"
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQQI")
"""Magic, version, bytes of the header, bytes of the file, vocabulary size, CRC-32 of all that and the header."""
ALIGNMENT = 64
BITS_PER_KEY = 16
"""Least size of the bitmap: at most one key in sixteen that was never seen gets past it."""
KEYS_PER_BUCKET = 2
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Fibonacci hashing: the top bits of the product are well mixed."""
NEVER = 1 << 60
"""Stands in for the last token where there is none: larger than all keys, and stays so when a context is added."""
DEEPEST = 1 << 10
"""Neighbours that a lookup compares at most; a whole table has a dozen."""
LARGEST_LATTICE = 1 << 22
"""Scores that are computed at once at the most."""


@dataclass(frozen=True, slots=True)
class Level:
    """All n-grams of one order, 2 or more, in the order of their hashed keys; `backoff` is None in the highest order.

    Those whose hash begins with the bits i lie from `start[i]` on, at most `depth` of them.
    """

    keys: Shaped[np.ndarray, " n"]
    log_p: Float32[np.ndarray, " n"]
    backoff: Float32[np.ndarray, " n"] | None
    start: UInt32[np.ndarray, " starts"]
    bitmap: UInt8[np.ndarray, " bytes"]
    depth: int

    def find(self, keys: Int64[np.ndarray, " q"]) -> tuple[Int64[np.ndarray, " hits"], Int64[np.ndarray, " hits"]]:
        """Which of `keys` are here (rising), and at which index. Keys that cannot be (negative, too large) are not."""
        h = hashed(keys)
        bit = top_bits(h, 8 * len(self.bitmap))
        maybe = np.flatnonzero(self.bitmap.take(bit >> 3) >> (bit & 7).astype(np.uint8) & 1)
        first = self.start.take(top_bits(h.take(maybe), len(self.start) - 1)).astype(np.int64)
        # numpy compares the narrow type with int64 by value: a key that does not fit is not found
        near = self.keys.take(first[:, None] + np.arange(self.depth), mode="wrap")
        which, step = np.divmod(np.flatnonzero(near == keys.take(maybe)[:, None]), self.depth)
        # the remainder changes nothing in a table that is whole
        return maybe.take(which), (first.take(which) + step) % max(1, len(self.keys))


def hashed(keys: Int64[np.ndarray, " q"]) -> UInt64[np.ndarray, " q"]:
    """Keys made to look random; no two become the same."""
    return keys.view(np.uint64) * MULTIPLIER


def top_bits(h: UInt64[np.ndarray, " q"], size: int) -> Int64[np.ndarray, " q"]:
    """As many of the first bits as tell `size` things apart, a power of two."""
    return (h >> np.uint64(65 - size.bit_length())).view(np.int64)


def index_keys(
    keys: Int64[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " n"], UInt32[np.ndarray, " starts"], UInt8[np.ndarray, " bytes"]]:
    """The order in which a `Level` has these keys, and its `start` and `bitmap`."""
    h = hashed(keys)
    order = h.argsort()
    buckets = _power_of_two(len(keys) // KEYS_PER_BUCKET)
    start = top_bits(h[order], buckets).searchsorted(np.arange(buckets + 1)).astype("<u4")
    size = _power_of_two(len(keys) * BITS_PER_KEY // 8)
    bit = top_bits(h, 8 * size)
    bitmap = np.zeros(size, np.uint8)
    np.bitwise_or.at(bitmap, bit >> 3, np.left_shift(1, bit & 7).astype(np.uint8))
    return order, start, bitmap


def _power_of_two(least: int) -> int:
    return 1 << max(1, (least - 1).bit_length())


class NgramTable:
    """A token n-gram model, shared by all who use it and never changed.

    Attributes:
        vocab_size: Tokens that it gives a probability to.
        levels: The n-grams of order 2, 3, ...
        about: What the header says besides: smoothing, tokens counted, where they came from.
    """

    def __init__(
        self,
        log_p: Float32[np.ndarray, " v"],
        backoff: Float32[np.ndarray, " v"],
        levels: tuple[Level, ...],
        about: dict[str, Any],
    ) -> None:
        self.log_p, self.backoff, self.levels, self.about = log_p, backoff, levels, about
        self.vocab_size = len(log_p)

    @property
    def order(self) -> int:
        """The n of the n-grams: n - 1 tokens of context."""
        return 1 + len(self.levels)

    @property
    def counts(self) -> tuple[int, ...]:
        """Entries by order; all tokens have one of order 1."""
        return (self.vocab_size, *(len(level.keys) for level in self.levels))

    def score(
        self, contexts: Int64[np.ndarray, "b w"], candidates: Int64[np.ndarray, " m"]
    ) -> Float32[np.ndarray, "b m"]:
        """log p(candidate | context), for all pairs.

        Contexts are the tokens before, the last one last; any number of them, and `NO_TOKEN` where there was none. A
        candidate that is no token of the vocabulary gets the log-probability of some token that is.
        """
        b, w = contexts.shape
        m, V = len(candidates), self.vocab_size
        last = np.where((candidates >= 0) & (candidates < V), candidates, NEVER)
        scores = np.repeat(self.log_p.take(candidates, mode="clip")[None], b, 0)
        for length in range(1, min(w, self.order - 1) + 1):
            index = self._index(contexts[:, w - length :])
            backoff = self.backoff if length == 1 else self.levels[length - 2].backoff
            if backoff is None or not len(backoff):  # no context of this length was seen
                break
            seen = index >= 0
            scores += np.where(seen, backoff.take(index, mode="clip"), 0)[:, None]
            level = self.levels[length - 1]
            hits, at = level.find(np.where(seen[:, None], index[:, None] * V + last, -1).ravel())
            scores.reshape(-1)[hits] = level.log_p[at]
        return scores.reshape(b, m)

    def _index(self, grams: Int64[np.ndarray, "b w"]) -> Int64[np.ndarray, " b"]:
        """Where each n-gram is in the arrays of its order; -1 if it was never seen."""
        index = np.where((grams[:, 0] >= 0) & (grams[:, 0] < self.vocab_size), grams[:, 0], -1)
        for level, token in zip(self.levels, grams.T[1:], strict=False):
            known = (index >= 0) & (token >= 0) & (token < self.vocab_size)
            hits, at = level.find(np.where(known, index * self.vocab_size + token, -1))
            index = np.full(len(grams), -1)
            index[hits] = at
        return index

    def lattice(self, before: Int64[np.ndarray, " w"], ids: Int64[np.ndarray, "k m"]) -> LatticeScores | None:
        """The scores of a whole lattice in one pass; the tokens `before` stand in before position 0.

        None if the model looks back further than two tokens, or the lattice is too wide for it.
        """
        (k, m), V = ids.shape, self.vocab_size
        if self.order > 3 or k * m**3 > LARGEST_LATTICE:
            return None
        # two positions of one candidate each go in front
        rows = np.full((k + 2, m), NO_TOKEN, np.int64)
        before = before[-2:]
        rows[2 - len(before) : 2, 0] = before
        rows[2:] = ids
        clipped = np.minimum(np.maximum(rows, 0), V - 1)
        known = rows == clipped
        backoff, log_p = self.backoff.take(clipped) * known, self.log_p.take(clipped)
        pairs = np.add(backoff[:-1, :, None], log_p[1:, None, :], order="C")
        extra = np.zeros((k, m, m, m), np.float32)
        if self.levels:
            # a context that is none makes a negative key, a last token that is none one that is too large
            heads, lasts = np.where(known, rows, -1) * V, np.where(known, rows, NEVER)
            hits, at = self.levels[0].find((heads[:-1, :, None] + lasts[1:, None, :]).ravel())
            pairs.reshape(-1)[hits] = self.levels[0].log_p[at]
            if len(self.levels) == 2:
                self._add_trigrams(pairs, extra, lasts, hits, at)
            extra[:1] = extra[:1, :1, :1]
            extra[1:2] = extra[1:2, :1]
        pairs[1:2] = pairs[1:2, :1]
        return LatticeScores(pairs[1:], extra)

    def _add_trigrams(
        self,
        pairs: Float32[np.ndarray, "rows m m"],
        extra: Float32[np.ndarray, "k m m m"],
        lasts: Int64[np.ndarray, "padded m"],
        hits: Int64[np.ndarray, " seen"],
        at: Int64[np.ndarray, " seen"],
    ) -> None:
        """What a context of two tokens changes. `hits`: where a seen pair is in `pairs`; `at`: where in the table."""
        k, m = extra.shape[:2]
        seen = np.zeros(((k + 1) * m, m), bool)
        seen.reshape(-1)[hits] = True
        inside = int(hits.searchsorted(k * m * m))
        hits, at = hits[:inside], at[:inside]
        # row (a, b) of one position is followed by row b of the next
        after = (hits // (m * m) + 1) * m + hits % m
        backoff = self.levels[0].backoff
        assert backoff is not None
        extra.reshape(-1, m)[hits] = backoff.take(at)[:, None]
        # a trigram can only have been seen if both of its pairs were; flat, since numpy is several times slower at
        # finding nonzeros of two dimensions
        one, c = np.divmod(np.flatnonzero(seen.take(after, 0)), m)
        two = after[one] * m + c
        found, where = self.levels[1].find(at[one] * self.vocab_size + lasts.reshape(-1)[two // m // m * m + m + c])
        change = self.levels[1].log_p.take(where) - pairs.reshape(-1)[two[found]]
        extra.reshape(-1)[hits[one[found]] * m + c[found]] = change


def open_table(path: str | os.PathLike[str]) -> NgramTable:
    """Maps a table into memory.

    Raises:
        ZerodraftError: no such file, not a table, of another version, cut short or damaged.
    """
    file = user_path(path)
    if file.exists() and not file.is_dir():
        check_regular(file, "n-gram table")
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(PREAMBLE.size)
            if start[: len(MAGIC)] != MAGIC:
                raise ZerodraftError(f"'{path}' is not an n-gram table: build one with 'zerodraft ngram build'.")
            damaged = ZerodraftError(f"The n-gram table '{path}' is cut short or damaged: build it again.")
            if len(start) < PREAMBLE.size:
                raise damaged
            _, version, header_size, file_size, vocab_size, checksum = PREAMBLE.unpack(start)
            if version != VERSION:
                raise ZerodraftError(
                    f"The n-gram table '{path}' has format {version}, this version of zerodraft reads {VERSION}: build "
                    "it again."
                )
            header = stream.read(min(header_size, size))
            if size != file_size or zlib.crc32(header, zlib.crc32(start[:-4])) != checksum:
                raise damaged
            body = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        reason = error.strerror or error
        raise ZerodraftError(
            f"The n-gram table '{path}' cannot be read ({reason}): build one with 'zerodraft ngram build'."
        ) from error
    try:
        return _from_header(json.loads(header), body, vocab_size)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged from error


KINDS = {"keys": ("<u4", "<i8"), "log_p": ("<f4",), "backoff": ("<f4",), "start": ("<u4",), "bitmap": ("|u1",)}
"""What numpy calls the types of the arrays."""


def _from_header(header: dict[str, Any], body: mmap.mmap, vocab_size: int) -> NgramTable:
    """The table that a header describes. Raises all kinds of errors where it describes none: a checksum tells that the
    header is as it was written, not that who wrote it meant well."""
    arrays = {}
    for name, (kind, count, offset) in header["arrays"].items():
        if kind not in KINDS[name.partition(".")[2]]:
            raise ValueError(f"{name} of type {kind}")
        arrays[name] = np.frombuffer(body, np.dtype(kind), range(count + 1)[-1], range(offset + 1)[-1])
    order, about = range(header["order"] + 1)[-1], {str(key): value for key, value in header["about"].items()}
    levels = tuple(
        Level(
            keys=arrays[f"{n}.keys"],
            log_p=arrays[f"{n}.log_p"],
            backoff=arrays[f"{n}.backoff"] if n < order else None,
            start=arrays[f"{n}.start"],
            bitmap=arrays[f"{n}.bitmap"],
            depth=depth,
        )
        for n, depth in enumerate(header["depths"], 2)
    )
    log_p, backoff = arrays["1.log_p"], arrays["1.backoff"]
    if not len(log_p) == len(backoff) == vocab_size > 0 or order != 1 + len(levels):
        raise ValueError("lengths that do not fit")
    contexts = vocab_size
    for level in levels:
        _check_level(level, contexts, vocab_size)
        contexts = len(level.keys)
    return NgramTable(log_p, backoff, levels, about)


def _check_level(level: Level, contexts: int, vocab_size: int) -> None:
    """Raises unless no lookup in this level can leave it, overflow, or take memory that the file does not have."""
    steps, count = np.diff(level.start.astype(np.int64)), len(level.keys)
    indexed = level.start[0] == 0 and level.start[-1] <= count and steps.min() >= 0
    hashes = all(size >= 2 and not size & (size - 1) for size in (len(steps), len(level.bitmap)))
    parts = [len(part) for part in (level.log_p, level.backoff) if part is not None]
    if not (indexed and hashes and level.depth == max(1, steps.max()) <= DEEPEST and set(parts) == {count}):
        raise ValueError("an index that is none")
    if contexts * vocab_size >= NEVER or (count == 0 and level.bitmap.any()):
        raise ValueError("keys that are none")


def save_table(table: NgramTable, path: str | os.PathLike[str]) -> int:
    """Writes a table whole or not at all, and returns its size in bytes."""
    file = user_path(path)
    arrays = {"1.log_p": table.log_p, "1.backoff": table.backoff}
    for n, level in enumerate(table.levels, 2):
        arrays |= {f"{n}.{part}": getattr(level, part) for part in ("keys", "log_p", "start", "bitmap")}
        if level.backoff is not None:
            arrays[f"{n}.backoff"] = level.backoff
    # offsets count from the end of the header, whose length depends on them; so its length is settled first
    start = _aligned(PREAMBLE.size + len(_header(table, arrays, 1 << 50)))
    header = _header(table, arrays, start).ljust(start - PREAMBLE.size)
    size = start + sum(_aligned(array.nbytes) for array in arrays.values())
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(header), size, table.vocab_size, 0)[:-4]
    checksum = zlib.crc32(header, zlib.crc32(preamble))
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as partial, partial.open("wb") as stream:
        stream.write(preamble + struct.pack("<I", checksum) + header)
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).data)
            stream.write(bytes(-array.nbytes % ALIGNMENT))
    return size


def _header(table: NgramTable, arrays: dict[str, np.ndarray], start: int) -> bytes:
    placed = {}
    for name, array in arrays.items():
        placed[name] = (array.dtype.newbyteorder("<").str, len(array), start)
        start += _aligned(array.nbytes)
    depths = [level.depth for level in table.levels]
    header = {"order": table.order, "depths": depths, "about": table.about, "arrays": placed}
    return json.dumps(header).encode()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
