"""Why arms that are better on the validation text are worse on another one: losses by kind of token, and calibration.

    python benchmarks/out_of_domain.py runs/evidence/small

Splits the loss of every finished run of a table on its texts by what could explain a difference, fits one temperature
to each model, and measures the same on WikiText without its markup. Writes
`results/evidence/out-of-domain-TABLE.json`, from which `python benchmarks/evidence.py report` makes a section of the
page. The data of the runs must be there (ZERODRAFT_DATA).
"""

import re
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from evidence_domain import Domain, Domains, Part
from evidence_plan import Run
from finished_runs import FinishedRun, check_same_text, look, look_arguments
from zerodraft import ZttForCausalLM
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.data import PackedBlocks, pack_texts, read_documents
from zerodraft.training.recipe import DataRecipe
from zerodraft.training.rows import Document, content

TEMPERATURES = tuple(round(0.7 + 0.05 * step, 2) for step in range(27))

MARKUP = re.compile(
    r"<unk>"  # a rare word
    r"| @[-,.]@ "  # a sign inside a word or number
    r"| [,.;:!?)\]%](?=\s)"  # a space before a sign that has none
    r"|[(\[] "
    r"| '(?=[a-z]+ )| n't(?= )"
    r'| "(?= )'
    r"| \n (= )*|( =)+(?= \n)"  # a line's end, with the signs of a heading
)
"""What WikiText's makers put into the text, or took apart."""

UNDO = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?)\]%])", r"\1"),
    (r"([(\[]) ", r"\1"),
    (r" (n't|'[a-z]+)\b", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
)
"""What turns it back into text, in this order."""


def plain_text(text: str) -> str:
    """WikiText as people write: paragraphs with their markup undone, without headings and sentences with `<unk>`."""
    paragraphs = []
    for line in text.split("\n"):
        sentences = re.split(r"(?<= [.!?]) ", line.strip())
        kept = " ".join(sentence for sentence in sentences if "<unk>" not in sentence)
        if kept and not kept.startswith("= "):
            paragraphs.append(kept)
    plain = "\n\n".join(paragraphs)
    for pattern, instead in UNDO:
        plain = re.sub(pattern, instead, plain)
    return plain


# --- what could explain a difference ---


def characters(tokenizer: Any) -> list[str]:
    """Each token of a byte-level vocabulary with a character for each byte; bytes outside ASCII are some other."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [token.replace("Ġ", " ").replace("Ċ", "\n") for token in tokens]


def by_markup(ids: Int[Tensor, "rows t"], tokens: list[str]) -> Int[Tensor, "rows t"]:
    """0: text, 1: a token with markup in it, 2: one that follows such."""
    parts = torch.zeros_like(ids)
    for row, line in enumerate(ids.tolist()):
        ends = np.cumsum([0, *(len(tokens[token]) for token in line)])
        marked = np.zeros(ends[-1], bool)
        for found in MARKUP.finditer("".join(tokens[token] for token in line)):
            marked[found.start() : found.end()] = True
        inside = torch.from_numpy(np.logical_or.reduceat(marked, ends[:-1]))
        parts[row] = inside
        parts[row, 1:][inside[:-1] & ~inside[1:]] = 2
    return parts


KINDS = ("word begins", "word goes on", "digit", "space or sign", "line break", "outside ASCII", "special")


def kind_of(token: str) -> int:
    """Which of KINDS a token is."""
    inner = token.strip(" ")
    if inner.startswith("<|"):
        return 6
    if "\n" in token:
        return 4
    if not inner.isascii():
        return 5
    if inner.isdigit():
        return 2
    return (0 if token[0] == " " else 1) if inner.isalpha() else 3


def pair_counts(train: PackedBlocks, vocabulary: int, limit: int = 8_000_000) -> Int[Tensor, " pairs"]:
    """How often each pair of neighbours is in the first tokens of the training text."""
    tokens = torch.from_numpy(train.tokens[:limit].astype(np.int64))
    return torch.bincount(tokens[:-1] * vocabulary + tokens[1:], minlength=vocabulary**2)


FREQUENCIES = ("pair never seen", "1 to 99 times", "100 to 9,999 times", "more often")
POSITIONS = ("position 1 to 7", "8 to 31", "32 and on")


def splits(
    ids: Int[Tensor, "rows t"], tokens: list[str], counts: Int[Tensor, " pairs"]
) -> dict[str, tuple[Sequence[str], Int[Tensor, "rows t-1"]]]:
    """By name: the parts' names, and the part of every predicted token."""
    target, previous = ids[:, 1:], ids[:, :-1]
    seen = counts[previous * len(tokens) + target]
    place = torch.arange(1, ids.shape[1]).repeat(len(ids), 1)
    kinds = torch.tensor([kind_of(token) for token in tokens])
    return {
        "markup": (("text", "markup", "after markup"), by_markup(ids, tokens)[:, 1:]),
        "kind": (KINDS, kinds[target]),
        "follows": (KINDS, kinds[previous]),
        "frequency": (FREQUENCIES, torch.bucketize(seen.contiguous(), torch.tensor([1, 100, 10_000]), right=True)),
        "position": (POSITIONS, torch.bucketize(place, torch.tensor([8, 32]), right=True)),
    }


# --- measuring ---


@torch.no_grad()
def token_losses(
    model: ZttForCausalLM, ids: Int[Tensor, "rows t"], batch_size: int = 16
) -> tuple[Float[Tensor, "rows t-1"], Float[Tensor, "rows t-1"], Float[Tensor, "rows temperatures"]]:
    """Loss and entropy of every predicted token, and the mean loss of each row at each of TEMPERATURES."""
    losses, entropies, heated = [], [], []
    for batch in ids.split(batch_size):
        logits, target = model(batch, use_cache=False).logits[:, :-1].float(), batch[:, 1:, None]
        log_p = logits.log_softmax(-1)
        losses.append(-log_p.gather(-1, target)[..., 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        right = log_p.gather(-1, target)[..., 0]
        at = [((log_p / heat).logsumexp(-1) - right / heat).mean(1) for heat in TEMPERATURES]
        heated.append(torch.stack(at, 1))
    return torch.cat(losses), torch.cat(entropies), torch.cat(heated)


def calibrated(heated: Float[Tensor, "rows temperatures"]) -> tuple[float, float]:
    """The temperature that is best on every other row, and the loss on the rows between at that temperature."""
    best = int(heated[::2].mean(0).argmin())
    return TEMPERATURES[best], float(heated[1::2, best].mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A text that all runs of a table are held to."""

    ids: Int[Tensor, "rows t"]
    splits: dict[str, tuple[Sequence[str], Int[Tensor, "rows t-1"]]]


def read_texts(finished: FinishedRun, further: Mapping[str, str], blocks: int) -> dict[str, Text]:
    """What a run and all others of its table are held to, by name: they read the same text with the same tokenizer."""
    tokenizer = finished.tokenizer()
    data = finished.data(tokenizer)
    tokens, counts = characters(tokenizer), pair_counts(data.train, len(tokenizer))
    more = more_texts(finished.recipe.data, tokenizer, data.evaluation, further)
    rows = {name: text.rows(blocks) for name, text in {**data.evaluation, **more}.items()}
    if data.validation is not None:
        rows = {"validation": data.validation.rows(blocks), **rows}
    return {name: Text(ids=ids, splits=splits(ids, tokens, counts)) for name, ids in rows.items()}


def measure(runs: list[FinishedRun], options: Namespace) -> Iterator[Domain]:
    """All runs on all texts.

    Raises:
        ZerodraftError: a further text is not named as NAME=FILE, or the runs did not read the same text.
    """
    further = dict(name_and_file(text) for text in options.text)
    check_same_text(runs)
    texts = read_texts(runs[0], further, options.blocks)
    for finished in runs:
        model = finished.model()
        for name, text in texts.items():
            yield measure_text(finished.run, model, name, text)


def measure_text(run: Run, model: ZttForCausalLM, name: str, text: Text) -> Domain:
    """One model on one text."""
    losses, entropies, heated = token_losses(model, text.ids)
    temperature, at_temperature = calibrated(heated)
    return Domain(
        **run._asdict(), text=name, tokens=text.ids.numel(), temperature=temperature,
        loss_at_temperature=at_temperature, loss_beside_it=float(heated[1::2, TEMPERATURES.index(1.0)].mean()),
        whole=part_of(losses, entropies, torch.ones_like(losses, dtype=torch.bool)),
        parts={
            split: {
                label: part_of(losses, entropies, part == index)
                for index, label in enumerate(labels)
                if (part == index).any()
            }
            for split, (labels, part) in text.splits.items()
        },
    )  # fmt: skip


def part_of(losses: Tensor, entropies: Tensor, within: Bool[Tensor, "rows t-1"]) -> Part:
    """The tokens within a part."""
    return Part(
        share=round(float(within.double().mean()), 6),
        loss=round(float(losses[within].double().mean()), 6),
        entropy=round(float(entropies[within].double().mean()), 6),
    )


def more_texts(
    recipe: DataRecipe, tokenizer: Any, evaluation: Collection[str], further: Mapping[str, str]
) -> dict[str, PackedBlocks]:
    """Evaluation texts with WikiText's markup once more without it, and further texts by name and file.

    Args:
        recipe: Of the run.
        tokenizer: Its own.
        evaluation: Names of the recipe's evaluation texts that are there.
        further: Files by name.
    """
    texts = {name: read_documents((recipe.evaluation[name],), recipe) for name in evaluation}
    documents: dict[str, Sequence[Document]] = {
        f"{name} without markup": [plain_text(content(document)) for document in text]
        for name, text in texts.items()
        if any("<unk>" in content(document) for document in text)
    }
    documents |= {name: read_documents((source,), recipe) for name, source in further.items()}
    length, limit = recipe.context_length, recipe.validation_blocks
    return {name: pack_texts(text, tokenizer, length, limit) for name, text in documents.items()}


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    parser = look_arguments(__doc__, blocks=400)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="a further text")
    return look(Domains, measure, parser, words)


def name_and_file(text: str) -> tuple[str, str]:
    """Both parts of NAME=FILE.

    Raises:
        ZerodraftError: one is missing.
    """
    name, _, file = text.partition("=")
    if not name or not file:
        raise ZerodraftError(f"--text '{text}' must look like NAME=FILE")
    return name, file


if __name__ == "__main__":
    sys.exit(main())
