"""From files to blocks of tokens: documents -> train / validation split -> token cache on disk -> packed blocks.

Everything is a function of the content: a document's split and its place in the order come from a hash of its text,
and the cache folder's name from a hash of the documents and the tokenizer. Two runs on the same text read the same
blocks in the same order, on every machine.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from zerodraft.common.errors import ZerodraftError, did_you_mean, why
from zerodraft.common.files import check_regular, json_object, read_text, user_path
from zerodraft.common.outputs import filled_once
from zerodraft.models.cache import default_cache_dir
from zerodraft.training.chat import Tokens, tokens_of
from zerodraft.training.recipe import DataRecipe
from zerodraft.training.rows import Document, content, document_of

logger = logging.getLogger(__name__)

FORMATS = (".txt", ".md", ".jsonl", ".parquet")

IGNORED = -100
"""Label of a token that the loss is not on, as transformers has it."""


class PackedBlocks(Dataset):
    """Fixed-length blocks cut from one long memory-mapped array of tokens; what is left over at the end is dropped.

    Args:
        tokens: the documents, one after another.
        length: tokens in a block.
        limit: at most this many blocks, evenly spaced; 0: all.
        tokens_per_byte: tokens of the whole text over its UTF-8 bytes, to turn a loss per token into bits per byte.
        learned: which tokens the loss is on; None for all. Blocks without one are left out.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        limit: int = 0,
        tokens_per_byte: float = float("nan"),
        learned: np.ndarray | None = None,
    ) -> None:
        self.tokens, self.length, self.tokens_per_byte, self.learned = tokens, length, tokens_per_byte, learned
        self.starts = np.arange(len(tokens) // length) * length
        if learned is not None:
            # nothing in a block comes before its first token, so that one is never predicted
            rows = learned[: len(self.starts) * length].reshape(-1, length)
            self.starts = self.starts[rows[:, 1:].any(axis=1)]
        self.starts = _spread(self.starts, limit)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        span = slice(self.starts[index], self.starts[index] + self.length)
        ids = torch.from_numpy(self.tokens[span].astype(np.int64))
        labels = ids.clone()
        if self.learned is not None:
            labels[torch.from_numpy(~self.learned[span])] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def rows(self, limit: int = 0) -> Int[Tensor, "rows t"]:
        """The tokens of all blocks, or of at most `limit` of them, evenly spaced."""
        chosen = _spread(np.arange(len(self)), limit).tolist()
        return torch.stack([self[index]["input_ids"] for index in chosen])

    def split(self, last: int, limit: int) -> tuple[PackedBlocks, PackedBlocks]:
        """All blocks but the `last` ones, and these, at most `limit` of them."""
        before, behind = copy.copy(self), copy.copy(self)
        before.starts, behind.starts = self.starts[:-last], _spread(self.starts[-last:], limit)
        return before, behind


def _spread(starts: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the blocks, from the whole text, not from its beginning; 0 for all."""
    return starts[:: max(1, len(starts) // limit)][:limit] if limit else starts


@dataclass(frozen=True, kw_only=True, slots=True)
class TextData:
    """The blocks of one run: to train on, to validate on, and further ones to evaluate on by name."""

    train: PackedBlocks
    validation: PackedBlocks | None
    evaluation: dict[str, PackedBlocks]


def build_data(recipe: DataRecipe, tokenizer: Any, documents: Sequence[Document]) -> TextData:
    """Splits, tokenizes (or reads from the cache) and packs.

    Args:
        recipe: where the validation and evaluation texts are, and all lengths.
        tokenizer: with an `eos_token_id`, which goes after every text.
        documents: the training documents, from `read_documents`.

    Raises:
        ZerodraftError: data is missing, or too short for a single block.
    """
    if recipe.validation:
        train = _pack(documents, tokenizer, recipe, "data.train")
        held_out = _pack(read_documents(recipe.validation, recipe), tokenizer, recipe, "data.validation", limited=True)
    else:
        train, held_out = _hold_out(recipe, tokenizer, documents)
    further = {
        name: _pack(read_documents((source,), recipe), tokenizer, recipe, f"data.evaluation.{name}", limited=True)
        for name, source in recipe.evaluation.items()
        if _can_be_had(name, source)
    }
    return TextData(train=train, validation=held_out, evaluation=further)


def _hold_out(
    recipe: DataRecipe, tokenizer: Any, documents: Sequence[Document]
) -> tuple[PackedBlocks, PackedBlocks | None]:
    """Blocks to train on and to validate on: of different documents, or of few documents the last blocks."""
    train, held_out = split_documents(documents, recipe.validation_fraction)
    if not recipe.validation_fraction:
        return _pack(train, tokenizer, recipe, "data.train"), None
    parts = [_blocks(part, tokenizer, recipe, limited) for part, limited in ((train, False), (held_out, True))]
    if all(len(part) for part in parts):
        return parts[0], parts[1]
    whole = _pack(documents, tokenizer, recipe, "data.train")
    if len(whole) == 1:
        logger.warning("There is no validation: data.train is a single block of %d tokens.", recipe.context_length)
        return whole, None
    last = min(max(1, round(recipe.validation_fraction * len(whole))), len(whole) - 1)
    logger.warning(
        "%d documents are too few to hold some back for validation: the last %d of %d blocks are held back instead.",
        len(documents),
        last,
        len(whole),
    )
    return whole.split(last, recipe.validation_blocks)


def _can_be_had(name: str, source: str) -> bool:
    """A recipe's further texts are extras, which whoever trains on texts of their own need not have."""
    unset = _unset(source)
    if unset:
        logger.warning("data.evaluation.%s is left out: the environment variable %s is not set.", name, unset)
    return not unset


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents, in the order of their hashes (a shuffle that keeps when files are added)."""
    if not 0 <= fraction < 1:
        raise ZerodraftError(f"data.validation_fraction is {fraction}, expected 0 <= fraction < 1")
    hashed = [(hashlib.sha256(content(document).encode()).digest(), document) for document in documents]
    ordered = sorted(hashed, key=lambda pair: pair[0])
    # the first bytes give the order, the last ones the split, so that the two are independent
    held_out = [int.from_bytes(digest[-8:], "big") < fraction * 2**64 for digest, _ in ordered]
    train = [document for (_, document), out in zip(ordered, held_out, strict=True) if not out]
    return train, [document for (_, document), out in zip(ordered, held_out, strict=True) if out]


def read_documents(sources: Sequence[str], recipe: DataRecipe) -> list[Document]:
    """All documents of files, folders, globs and `hub:NAME` data sets, long texts cut between paragraphs.

    Raises:
        ZerodraftError: an unset $VARIABLE, a path that does not exist, an unknown format, a row that is no document, or
            no text at all.
    """
    if not sources:
        raise ZerodraftError("data.train is empty: name at least one file, folder, glob or hub:NAME")
    documents: list[Document] = []
    for source in sources:
        nulls = 0
        for document in _read_source(source, recipe):
            if document is None:
                nulls += 1
            elif isinstance(document, str):
                documents += cut_document(document, recipe.document_chars)
            else:
                documents.append(document)
        if nulls:
            logger.warning("'%s': rows without text (null) are left out, %d of them.", source, nulls)
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


def _read_source(source: str, recipe: DataRecipe) -> Iterator[Document | None]:
    if source.startswith("hub:"):
        yield from (document_of(row, recipe, f"a row of '{source}'") for row in _hub_rows(source[4:], recipe.hub_split))
        return
    for path in _expand(source):
        if _format(path) in (".txt", ".md"):
            text = read_text(path, "data file")
            yield from text.split(recipe.separator) if recipe.separator else (text,)
        elif _format(path) == ".jsonl":
            # split on "\n" only: strings may hold U+2028 and other characters that str.splitlines takes for line ends
            for number, line in enumerate(read_text(path, "data file").split("\n"), 1):
                if line.strip():
                    where = f"'{path}' line {number}"
                    yield document_of(json_object(line, where), recipe, where)
        else:
            yield from (document_of(row, recipe, f"a row of '{path}'") for row in _parquet_rows(path))


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
        raise ZerodraftError(f"'{path}' is not a complete parquet file: {why(error)}") from error


def _unset(source: str) -> str | None:
    """The name of an environment variable in a source that is not set."""
    found = re.search(r"\$\{?(\w+)", os.path.expandvars(source))
    return found[1] if found else None


def _expand(source: str) -> list[Path]:
    expanded = os.fspath(user_path(os.path.expandvars(source)))
    if unset := _unset(source):
        raise ZerodraftError(f"'{source}': the environment variable {unset} is not set")
    path = Path(expanded)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _format(p) in FORMATS)
        if not found:
            raise ZerodraftError(f"no data in the folder '{source}': expected files in one of {', '.join(FORMATS)}")
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if Path(p).is_file())
    if not found:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        suggestion = did_you_mean(path.name, siblings) if siblings else ""
        raise ZerodraftError(f"no data at '{source}'{suggestion if 'did you' in suggestion else ''}")
    for file in found:
        if _format(file) not in FORMATS:
            raise ZerodraftError(f"'{file}' has an unknown format: expected one of {', '.join(FORMATS)}")
    return found


def _format(path: Path) -> str:
    """The end of a file's name, which tells what is in it."""
    return path.suffix.lower()


def _hub_rows(name: str, split: str) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ZerodraftError("hub data sets need the train extra: pip install 'zerodraft[train]'") from error
    try:
        return datasets.load_dataset(name, split=split)  # type: ignore[return-value]  # rows are dicts
    except Exception as error:  # the library raises many kinds, none of them its own base class
        raise ZerodraftError(f"data set 'hub:{name}' could not be loaded: {why(error)}") from error


def _pack(
    documents: Sequence[Document], tokenizer: Any, recipe: DataRecipe, what: str, limited: bool = False
) -> PackedBlocks:
    blocks = _blocks(documents, tokenizer, recipe, limited)
    if len(blocks.tokens) < recipe.context_length:
        raise ZerodraftError(
            f"{what} has {len(blocks.tokens)} tokens, fewer than one block of data.context_length="
            f"{recipe.context_length}"
        )
    if not len(blocks):
        raise ZerodraftError(f"{what} has no block with a token to learn: there is no completion in it")
    return blocks


def _blocks(documents: Sequence[Document], tokenizer: Any, recipe: DataRecipe, limited: bool) -> PackedBlocks:
    masked = recipe.completion_only_loss and not all(isinstance(document, str) for document in documents)
    tokens, learned = _tokenize_cached(documents, tokenizer, cache_folder(recipe), masked)
    size = sum(len(content(document).encode()) for document in documents)
    # of a part of the tokens there is no such measure
    per_byte = float("nan") if masked or not size else len(tokens) / size
    limit = recipe.validation_blocks if limited else 0
    return PackedBlocks(tokens, recipe.context_length, limit, per_byte, learned)


def cache_folder(recipe: DataRecipe) -> Path:
    """Where tokenized data and tokenizers of a recipe are kept."""
    return default_cache_dir() if recipe.cache is None else user_path(recipe.cache)


def pack_texts(documents: Sequence[Document], tokenizer: Any, length: int, limit: int = 0) -> PackedBlocks:
    """Blocks of documents that are read once: tokenized without the cache, with the loss on every token."""
    return PackedBlocks(_tokenize(documents, tokenizer, masked=False)[0], length, limit)


def _tokenize_cached(
    documents: Sequence[Document], tokenizer: Any, cache: Path, masked: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens of all documents, and, if `masked`, which of them are learned, both memory-mapped."""
    digest = hashlib.sha256(_tokenizer_fingerprint(tokenizer))
    if not all(isinstance(document, str) for document in documents):
        digest.update(f"{masked}{tokenizer.chat_template}".encode())
    for document in documents:
        digest.update(hashlib.sha256(content(document).encode()).digest())
    folder = cache / digest.hexdigest()[:32]
    names = ("tokens.npy", "learned.npy") if masked else ("tokens.npy",)

    def save(partial: Path) -> None:
        # the second array is only there if it is wanted
        for name, array in zip(names, _tokenize(documents, tokenizer, masked), strict=False):
            np.save(partial / name, array)

    filled_once(folder, save)
    arrays = [np.load(folder / name, mmap_mode="r") for name in names]
    return arrays[0], arrays[1] if masked else None


def _tokenize(documents: Sequence[Document], tokenizer: Any, masked: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all documents, and whether they are learned."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts, learned = [np.empty(0, dtype)], [np.empty(0, bool)]
    for ids, mask in encode(documents, tokenizer, masked):
        parts.append(np.asarray(ids, dtype))
        learned.append(np.asarray(mask, bool))
    return np.concatenate(parts), np.concatenate(learned)


def encode(documents: Sequence[Document], tokenizer: Any, completion_only: bool = False) -> Iterator[Tokens]:
    """The tokens of each document, a text's with the end-of-text token after them, and whether they are learned."""
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        texts = [document for document in batch if isinstance(document, str)]
        # verbose=False: documents may be longer than the model's context, they are cut into blocks later
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        following = iter(encoded)
        for document in batch:
            if isinstance(document, str):
                ids = [*next(following), tokenizer.eos_token_id]
                yield ids, [True] * len(ids)
            else:
                yield tokens_of(document, tokenizer, completion_only)


def _tokenizer_fingerprint(tokenizer: Any) -> bytes:
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{text}{tokenizer.eos_token_id}".encode()
