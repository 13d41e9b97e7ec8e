"""From files to blocks of tokens: documents -> train / validation split -> token cache on disk -> packed blocks.

Everything is a function of the content: a document's split and its place in the order come from a hash of its text,
and the cache folder's name from a hash of the documents and the tokenizer. Two runs on the same text read the same
blocks in the same order, on every machine.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zerodraft.errors import ZerodraftError, why
from zerodraft.files import check_regular, read_text, user_path, whole_characters
from zerodraft.training.jsonl import json_row
from zerodraft.training.recipe import DataRecipe
from zerodraft.training.strict import did_you_mean

FORMATS = (".txt", ".md", ".jsonl", ".parquet")

SCALARS = (str, int, float)
"""What can stand in a template."""


class PackedBlocks(Dataset):
    """Fixed-length blocks cut from one long memory-mapped array of tokens; what is left over at the end is dropped.

    Attributes:
        tokens_per_byte: tokens of the whole text over its UTF-8 bytes, to turn a loss per token into bits per byte.
    """

    def __init__(self, tokens: np.ndarray, length: int, limit: int = 0, tokens_per_byte: float = float("nan")) -> None:
        blocks = len(tokens) // length
        self.tokens, self.length, self.tokens_per_byte = tokens, length, tokens_per_byte
        self.blocks = min(blocks, limit) if limit else blocks
        # a limited evaluation takes blocks from the whole text, not from its beginning
        self.stride = max(1, blocks // self.blocks) if self.blocks else 1

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.stride * self.length
        ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData:
    """The blocks of one run: to train on, to validate on, and further ones to evaluate on by name."""

    train: PackedBlocks
    validation: PackedBlocks | None
    evaluation: dict[str, PackedBlocks]


def build_data(recipe: DataRecipe, tokenizer: Any, documents: Sequence[str]) -> TextData:
    """Splits, tokenizes (or reads from the cache) and packs.

    Args:
        recipe: where the validation and evaluation texts are, and all lengths.
        tokenizer: with an `eos_token_id`, which goes after every document.
        documents: the training documents, from `read_documents`.

    Raises:
        ZerodraftError: data is missing, or too short for a single block.
    """
    if recipe.validation:
        train, validation = list(documents), read_documents(recipe.validation, recipe)
    else:
        train, validation = split_documents(documents, recipe.validation_fraction)
    blocks = _pack(train, tokenizer, recipe, "data.train", limit=0)
    held_out = _pack(validation, tokenizer, recipe, "data.validation", recipe.validation_blocks) if validation else None
    further = {
        name: _pack(
            read_documents((source,), recipe), tokenizer, recipe, f"data.evaluation.{name}", recipe.validation_blocks
        )
        for name, source in recipe.evaluation.items()
    }
    return TextData(train=blocks, validation=held_out, evaluation=further)


def split_documents(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Train and validation documents, in the order of their hashes (a shuffle that keeps when files are added)."""
    if not 0 <= fraction < 1:
        raise ZerodraftError(f"data.validation_fraction is {fraction}, expected 0 <= fraction < 1")
    ordered = sorted((hashlib.sha256(text.encode()).digest(), text) for text in documents)
    # the first bytes give the order, the last ones the split, so that the two are independent
    held_out = [int.from_bytes(digest[-8:], "big") < fraction * 2**64 for digest, _ in ordered]
    train = [text for (_, text), out in zip(ordered, held_out, strict=True) if not out]
    return train, [text for (_, text), out in zip(ordered, held_out, strict=True) if out]


def read_documents(sources: Sequence[str], recipe: DataRecipe) -> list[str]:
    """All documents of files, folders, globs and `hub:NAME` data sets, long ones cut between paragraphs.

    Raises:
        ZerodraftError: an unset $VARIABLE, a path that does not exist, an unknown format, or no text at all.
    """
    if not sources:
        raise ZerodraftError("data.train is empty: name at least one file, folder, glob or hub:NAME")
    documents = [
        piece
        for source in sources
        for document in _read_source(source, recipe)
        for piece in cut_document(document, recipe.document_chars)
    ]
    if not documents:
        raise ZerodraftError(f"no text found in {', '.join(sources)}")
    return documents


def cut_document(document: str, chars: int) -> Iterator[str]:
    """Pieces of about `chars` characters that end where a paragraph ends; nothing is lost but blank ends."""
    start = 0
    while len(document) - start > chars:
        end = document.find("\n\n", start + chars)
        if end < 0:
            break
        piece = document[start:end].strip()
        if piece:
            yield piece
        start = end
    rest = document[start:].strip()
    if rest:
        yield rest


def _read_source(source: str, recipe: DataRecipe) -> Iterator[str]:
    if source.startswith("hub:"):
        yield from (_field(row, recipe, source) for row in _hub_rows(source[4:], recipe.hub_split))
        return
    for path in _expand(source):
        if path.suffix in (".txt", ".md"):
            text = read_text(path, "data file")
            yield from text.split(recipe.separator) if recipe.separator else (text,)
        elif path.suffix == ".jsonl":
            # split on "\n" only: strings may hold U+2028 and other characters that str.splitlines takes for line ends
            for number, line in enumerate(read_text(path, "data file").split("\n"), 1):
                if line.strip():
                    yield _field(json_row(line, path, number), recipe, str(path))
        else:
            yield from (_field(row, recipe, str(path)) for row in _parquet_rows(path))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ZerodraftError("parquet files need the train extra: pip install 'zerodraft[train]'") from error
    check_regular(path, "data file")
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    # over a damaged file pyarrow raises its own kinds and Python's (a text that is no UTF-8, a date beyond its range)
    except Exception as error:
        raise ZerodraftError(f"'{path}' is no whole parquet file: {why(error)}") from error


def _expand(source: str) -> list[Path]:
    expanded = os.fspath(user_path(os.path.expandvars(source)))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise ZerodraftError(f"'{source}': the environment variable {unset[1]} is not set")
    path = Path(expanded)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in FORMATS)
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if Path(p).is_file())
    if not found:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        suggestion = did_you_mean(path.name, siblings) if siblings else ""
        raise ZerodraftError(f"no data at '{source}'{suggestion if 'did you' in suggestion else ''}")
    for file in found:
        if file.suffix not in FORMATS:
            raise ZerodraftError(f"'{file}' has an unknown format: expected one of {', '.join(FORMATS)}")
    return found


def _field(row: dict[str, Any], recipe: DataRecipe, source: str) -> str:
    """The text of a row. A null or a list is none: as "None" or "['a', 'b']" it would be trained on unseen."""
    names, kinds = ((recipe.text_field,), str) if not recipe.template else (template_fields(recipe.template), SCALARS)
    for name in names:
        if name not in row:
            raise ZerodraftError(f"a row of '{source}' has no field '{name}'{did_you_mean(name, row)}")
        if not isinstance(row[name], kinds):
            found = "null" if row[name] is None else f"a {type(row[name]).__name__}"
            raise ZerodraftError(f"a row of '{source}' has {found} in '{name}', expected a text: leave such rows out")
    return whole_characters(recipe.template.format(**row) if recipe.template else row[recipe.text_field])


@functools.cache
def template_fields(template: str) -> tuple[str, ...]:
    """The fields that a template names.

    Raises:
        ZerodraftError: its braces do not match, or it asks for more than fields.
    """
    try:
        parts = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ZerodraftError(f"data.template {template!r} cannot be read: {why(error)}") from error
    names = tuple(name for name, _, _ in parts if name is not None)
    if not all(name.isidentifier() for name in names) or any(form or conversion for _, form, conversion in parts):
        raise ZerodraftError(f"data.template is {template!r}; expected names of fields in braces, such as '{{text}}'")
    return names


def _hub_rows(name: str, split: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ZerodraftError("hub data sets need the train extra: pip install 'zerodraft[train]'") from error
    try:
        return datasets.load_dataset(name, split=split)  # type: ignore[return-value]  # rows are dicts
    except Exception as error:  # the library raises many kinds, none of them its own base class
        raise ZerodraftError(f"data set 'hub:{name}' could not be loaded: {why(error)}") from error


def _pack(documents: Sequence[str], tokenizer: Any, recipe: DataRecipe, what: str, limit: int) -> PackedBlocks:
    tokens, size = _tokenize_cached(documents, tokenizer, user_path(recipe.cache))
    blocks = PackedBlocks(tokens, recipe.context_length, limit, tokens_per_byte=len(tokens) / size)
    if not len(blocks):
        raise ZerodraftError(
            f"{what} has {len(tokens)} tokens, fewer than one block of data.context_length={recipe.context_length}"
        )
    return blocks


def _tokenize_cached(documents: Sequence[str], tokenizer: Any, cache: Path) -> tuple[np.ndarray, int]:
    """The tokens of all documents, each followed by the end-of-text token, memory-mapped; and their size in bytes."""
    digest = hashlib.sha256(_tokenizer_fingerprint(tokenizer))
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = cache / digest.hexdigest()[:32]
    size = sum(len(text.encode()) for text in documents)
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
        try:
            np.save(partial / "tokens.npy", _tokenize(documents, tokenizer))
            os.replace(partial, folder)
        except OSError:
            # another process finished the same folder first; its content is the same
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.is_dir():
                raise
    return np.load(folder / "tokens.npy", mmap_mode="r"), size


def _tokenize(documents: Sequence[str], tokenizer: Any) -> np.ndarray:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts = []
    for start in range(0, len(documents), 64):
        # verbose=False: documents may be longer than the model's context, they are cut into blocks later
        batch = tokenizer(list(documents[start : start + 64]), add_special_tokens=False, verbose=False)["input_ids"]
        parts += [np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype) for ids in batch]
    return np.concatenate(parts)


def _tokenizer_fingerprint(tokenizer: Any) -> bytes:
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{text}{tokenizer.eos_token_id}".encode()
