"""Completions on disk: what a target wrote itself, to train drafters with, and how to read it.

A shard is two files: `NAME.bin` holds token ids, one sequence after another (little-endian uint16, or uint32 for
vocabularies above 65,536), `NAME.jsonl` has one line a sequence, in the same order: `n` its tokens, `p` how many of
them are the prompt, `temp` the sampling temperature (0 for greedy), `src` where the prompt came from. The index is
renamed into place after the tokens, so a shard without an index is not there yet.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_text, user_path
from zerodraft.common.outputs import write_whole

WIDTHS = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
"""Bytes a token to its type on disk."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sequence: a prompt and what the target made of it."""

    tokens: list[int]
    prompt_length: int
    temperature: float
    source: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Some sequences: their tokens (memory-mapped) and their index."""

    name: str
    tokens: Shaped[np.ndarray, "t"]
    lengths: Int64[np.ndarray, "s"]
    prompt_lengths: Int64[np.ndarray, "s"]
    temperatures: Float32[np.ndarray, "s"]
    sources: tuple[str, ...]


class Completions:
    """A sequence of `(tokens, prompt_length)`; tokens from `prompt_length` on are the completion.

    Attributes:
        lengths: Tokens of each sequence, prompt and completion.
        prompt_lengths: Tokens of each prompt.
        temperatures: Sampling temperature of each completion; 0 is greedy.
        sources: Where each prompt came from.
        shards: Names of the shards, in order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shard.name for shard in shards)
        self.lengths = _joined([shard.lengths for shard in shards], np.int64)
        self.prompt_lengths = _joined([shard.prompt_lengths for shard in shards], np.int64)
        self.temperatures = _joined([shard.temperatures for shard in shards], np.float32)
        self.sources = tuple(source for shard in shards for source in shard.sources)
        self._tokens = [shard.tokens for shard in shards]
        self._first = np.cumsum([0, *(len(shard.lengths) for shard in shards)])
        ends = [np.cumsum(shard.lengths) for shard in shards]
        self._starts = _joined([end - shard.lengths for end, shard in zip(ends, shards, strict=True)], np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Int64[np.ndarray, "n"], int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        start = int(self._starts[index])
        tokens = self._tokens[shard][start : start + int(self.lengths[index])]
        return np.asarray(tokens, np.int64), int(self.prompt_lengths[index])


def read_completions(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Completions:
    """Reads shards: directories (all shards in them, by name) or single `.bin` or `.jsonl` files.

    Raises:
        ZerodraftError: nothing there, an index that is not one, or tokens and index that do not belong together.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    shards = [read_shard(file) for path in paths for file in _indices(user_path(path))]
    if not any(len(shard.lengths) for shard in shards):
        raise ZerodraftError("The given completions are empty: no sequence in any of them.")
    return Completions(shards)


def check_vocabulary(completions: Completions, size: int) -> None:
    """Raises `ZerodraftError` if a token is beyond a vocabulary of `size`."""
    largest = max(int(completions[i][0].max()) for i in range(len(completions)))
    if largest >= size:
        raise ZerodraftError(
            f"The completions hold token {largest}, the target's vocabulary has {size}: they are from another model; "
            "give completions of this target, or the target that wrote them."
        )


def read_shard(index: Path) -> Shard:
    """Reads one shard by its `.jsonl` file."""
    lengths, prompts, temperatures, sources = [], [], [], []
    # split on "\n" only: strings may hold characters that str.splitlines takes for line ends
    for number, line in enumerate(read_text(index, "index").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            n, p, temperature = row["n"], row["p"], float(row["temp"])
            source = str(row.get("src", ""))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ZerodraftError(
                f"'{index}' line {number} is not an entry of a completions index: expected an object with n, p, temp."
            ) from error
        if type(n) is not int or type(p) is not int or not 0 <= p <= n or n == 0 or not 0 <= temperature < np.inf:
            raise ZerodraftError(
                f"'{index}' line {number} says n={n} tokens with p={p} of the prompt at temp={temperature}; expected "
                "whole numbers 0 <= p <= n, n above 0, and a temperature of 0 or more."
            )
        lengths.append(n)
        prompts.append(p)
        temperatures.append(temperature)
        sources.append(source)
    return Shard(
        name=index.stem,
        tokens=_map(index.with_suffix(".bin"), sum(lengths)),
        lengths=np.array(lengths, np.int64),
        prompt_lengths=np.array(prompts, np.int64),
        temperatures=np.array(temperatures, np.float32),
        sources=tuple(sources),
    )


def write_shard(folder: Path, name: str, rows: Sequence[Completion], vocab_size: int) -> None:
    """Writes one shard whole: the tokens first, then the index that makes it count."""
    dtype = WIDTHS[2 if vocab_size <= 1 << 16 else 4]
    data = b"".join(np.array(row.tokens, dtype).tobytes() for row in rows)
    index = [{"n": len(row.tokens), "p": row.prompt_length, "temp": row.temperature, "src": row.source} for row in rows]
    write_whole(folder / f"{name}.bin", data)
    write_whole(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in index))


def _map(path: Path, count: int) -> Shaped[np.ndarray, "t"]:
    """The tokens of a file; their type follows from its size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ZerodraftError(f"The tokens '{path}' beside their index cannot be read: {error.strerror}.") from error
    if count == 0 and size == 0:
        return np.empty(0, np.uint16)
    width, rest = divmod(size, max(count, 1))
    if rest or width not in WIDTHS:
        raise ZerodraftError(
            f"'{path}' has {size} bytes, but its index counts {count} tokens, which take {2 * count} or {4 * count}: "
            "one of the two files is cut off or from another shard."
        )
    return np.memmap(path, WIDTHS[width], mode="r")


def _indices(path: Path) -> list[Path]:
    """The index files of a directory or of one named file."""
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if not found:
            raise ZerodraftError(
                f"'{path}' holds no completions (.bin with .jsonl): make some with 'zerodraft distill'."
            )
        return found
    if path.suffix not in (".bin", ".jsonl") or not path.is_file():
        raise ZerodraftError(f"No completions at '{path}': expected a directory, or a .bin file with its .jsonl index.")
    return [path.with_suffix(".jsonl")]


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])
