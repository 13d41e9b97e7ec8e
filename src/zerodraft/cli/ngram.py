"""`zerodraft ngram build`, `words` and `info`: n-gram tables for the path search, from text or tokens."""

import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.text import Text

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.cli.progress import LiveProgress
from zerodraft.common.errors import ZerodraftError, printable
from zerodraft.common.files import user_path
from zerodraft.common.outputs import check_file, new_file

BATCH = 64
"""Texts that are tokenised at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OverTokens(Command):
    """What the commands that go through a target's tokens have in common."""

    files: tuple[str, ...] = positional("FILE...")
    """Files, directories, globs: text (.txt, .md), JSONL, parquet, or completions (.bin)."""
    target: str = metavar("DIR|NAME", also=("model",))
    """The model whose tokenizer is used: directory, hub id or short name."""
    out: str = metavar("FILE")
    """The file to write."""
    text_field: str = "text"
    """Field with the text, in JSONL and parquet."""
    template: str | None = None
    """Text made of several fields, such as "{instruction}\\n{output}"."""
    separator: str | None = None
    """Splits a text file into documents."""

    def check(self) -> None:
        """Looks at where the output goes."""
        check_file(self.out, "--out")

    @abstractmethod
    def write(self, documents: "TokenFiles", path: Path, out: Path, progress: "LiveProgress") -> Result:
        """Writes `out` from the documents, in tokens of the model at `path`; `tokens`, `bytes` and more."""

    def run(self, console: Console) -> Result:
        """Reads the files, writes and reports."""
        from zerodraft.models.resolve import resolve

        path, out = resolve(self.target), user_path(self.out)
        started = time.perf_counter()
        with LiveProgress(console) as progress, tempfile.TemporaryDirectory(prefix="zerodraft-ngram-") as folder:
            documents = self._documents(path, Path(folder), progress)
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ZerodraftError(f"--out is '{self.out}', which cannot be made: {error.strerror}") from error
            result = self.write(documents, path, out, progress)
        result |= {"out": self.out, "documents": len(documents), "seconds": time.perf_counter() - started}
        size = f"{result['bytes'] / 1e6:.1f} MB"
        grams = ", ".join(f"{count:,} {n}-grams" for n, count in enumerate(result.get("counts", ()), 1) if n > 1)
        console.print(
            f"{result['tokens']:,} tokens in {len(documents):,} documents -> {self.out} ({size}"
            f"{', ' + grams if grams else ''}) in {result['seconds']:.1f} s"
        )
        return result

    def _documents(self, path: Path, folder: Path, progress: "LiveProgress") -> "TokenFiles":
        """The tokens of all files; those of texts are kept in `folder`, since they are gone through several times."""
        from zerodraft.models.tokenizers import load_tokenizer
        from zerodraft.training.data import encode, read_documents
        from zerodraft.training.drafters.completions import read_completions
        from zerodraft.training.recipe import DataRecipe

        shards = [file for file in self.files if holds_tokens(user_path(file))]
        sources = [file for file in self.files if file not in shards]
        completions = read_completions(shards) if shards else ()
        if not sources:
            return TokenFiles(completions, ())
        tokenizer = load_tokenizer(path)
        recipe = DataRecipe(text_field=self.text_field, template=self.template, separator=self.separator)
        lengths, done = [], 0
        with (folder / "tokens.bin").open("wb") as stream:
            # one source after another: no more than one is in memory
            for source in sources:
                documents = read_documents((source,), recipe)
                for at, (ids, _) in enumerate(encode(documents, tokenizer), 1):
                    stream.write(np.array(ids, "<u4").data)
                    lengths.append(len(ids))
                    done += len(ids)
                    if at % BATCH == 0 or at == len(documents):
                        progress.count("tokenising", done)
        tokens = np.memmap(folder / "tokens.bin", "<u4", "r")
        return TokenFiles(completions, np.split(tokens, np.cumsum(lengths)[:-1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramBuild(OverTokens):
    """Build an n-gram table of a target's tokens, which tells the path search which drafted tokens go together.

    It counts the tokens of texts, or of completions from 'zerodraft distill' (.bin, or their directory). Smoothing:
    interpolated Kneser-Ney with three discounts for each order.
    """

    example: ClassVar[str] = "zerodraft ngram build completions --target smollm2 --out smollm2.ngram"

    order: int = 3
    """The n of the longest n-grams: the table looks back n - 1 tokens."""
    min_count: int = 1
    """Keep the longest n-grams that were seen this often (a smaller table)."""

    def check(self) -> None:
        """Looks at the numbers too."""
        from zerodraft.decoding.ngram_build import LONGEST

        OverTokens.check(self)
        if not 1 <= self.order <= LONGEST:
            raise ZerodraftError(f"--order is {self.order}; it must be from 1 to {LONGEST}")
        if self.min_count < 1:
            raise ZerodraftError(f"--min-count is {self.min_count}; it must be at least 1")

    def write(self, documents: "TokenFiles", path: Path, out: Path, progress: "LiveProgress") -> Result:
        from zerodraft.decoding.ngram import save_table
        from zerodraft.decoding.ngram_build import build_table

        table = build_table(
            documents,
            vocabulary_of(path),
            order=self.order,
            min_count=self.min_count,
            about={"target": self.target, "files": [Path(file).name for file in self.files]},
            on_progress=progress.count,
        )
        size = save_table(table, out)
        return {
            "order": table.order,
            "vocab_size": table.vocab_size,
            "tokens": table.about["tokens"],
            "counts": list(table.counts),
            "smoothing": table.about["smoothing"],
            "bytes": size,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramWords(OverTokens):
    """Write the tokens of texts as words, a document a line, for KenLM's lmplz."""

    example: ClassVar[str] = "zerodraft ngram words completions --target smollm2 --out smollm2.words"

    def write(self, documents: "TokenFiles", path: Path, out: Path, progress: "LiveProgress") -> Result:
        tokens = 0
        with new_file(out) as partial, partial.open("w", encoding="ascii", newline="\n") as stream:
            for document in documents:
                stream.write(" ".join(map(str, document.tolist())) + "\n")
                tokens += len(document)
                progress.count("words", tokens)
        return {"tokens": tokens, "bytes": out.stat().st_size}


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramInfo(Command):
    """Tell what an n-gram table holds."""

    example: ClassVar[str] = "zerodraft ngram info smollm2.ngram"

    file: str = positional("TABLE")
    """The table."""

    def run(self, console: Console) -> Result:
        """Reads and reports."""
        from zerodraft.decoding.ngram import open_table

        table = open_table(self.file)
        grams = ", ".join(f"{count:,} {n}-grams" for n, count in enumerate(table.counts, 1) if n > 1)
        console.print(f"order {table.order}, vocabulary of {table.vocab_size:,} tokens{', ' + grams if grams else ''}")
        for key, value in table.about.items():
            # it is as it stands in the file, which may be a stranger's
            console.print(Text(printable(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")))
        return {
            **table.about,
            "order": table.order,
            "vocab_size": table.vocab_size,
            "counts": list(table.counts),
            "bytes": user_path(self.file).stat().st_size,
        }


class TokenFiles:
    """The documents of completions and of texts, which can be gone through again and again."""

    def __init__(self, completions: Any, texts: Sequence[np.ndarray]) -> None:
        self.completions, self.texts = completions, texts

    def __len__(self) -> int:
        return len(self.completions) + len(self.texts)

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(len(self.completions)):
            # the prompt's tokens count as well: they made held-back completions likelier
            yield self.completions[index][0]
        yield from self.texts


def holds_tokens(path: Path) -> bool:
    """Whether these are completions rather than text: a token file, its index, or a directory with token files."""
    return path.suffix == ".bin" or path.with_suffix(".bin").is_file() or (path.is_dir() and any(path.glob("*.bin")))


def vocabulary_of(path: Path) -> int:
    """Tokens that a model gives logits for."""
    from zerodraft.models.loading import load_config

    size = getattr(load_config(path).get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ZerodraftError(
            f"'{path}' has no model configuration with a vocab_size: name the target that the tokens are for."
        )
    return size
