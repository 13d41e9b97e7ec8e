"""A drafter whose model has another tokenizer than the target: drafts go through the text.

What is known is decoded with the target's tokenizer and encoded with the drafter's; what the drafter adds is decoded
and encoded with the target's (the idea of universal assisted generation,
huggingface.co/blog/universal_assisted_generation). Outputs are exact whatever goes wrong on the way: only the target's
own choices become text.

The two ends of a draft need care. *Where it begins*: a target token may have ended inside a word or inside a
character. A character that is not complete is left out of what the drafter reads, and its bytes must come back at the
front of the draft. If the target's tokenizer would not have cut where it did, the draft is encoded by itself. *Where it
ends*: the last token is unsure, for the drafter's next one might have made it longer; so one token more than wanted is
drafted, and cut off.

As the text grows, its end may be encoded anew (`m` + `at` is one token `mat`). The drafter then goes back to the
longest common prefix.
"""

import logging
from collections.abc import Sequence
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, Qwen2Tokenizer

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Drafter, DraftSession, EndingDrafter, Progress
from zerodraft.models.loading import load_tokenizer_files

logger = logging.getLogger(__name__)

UNFINISHED = "\ufffd"
"""What tokenizers decode the bytes of an incomplete character to."""
TAIL = 16
"""Tokens at the end of the text that are enough to see how a tokenizer goes on after it."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""One of these has the tokens."""


class RetokenizedDrafter:
    """Drafts through the text with a drafter that wants no hidden states.

    Args:
        drafter: Any drafter over the tokens of `own`.
        own: The drafter's tokenizer, a fast one.
        target: The target's tokenizer, a fast one.
    """

    taps: Sequence[int] = ()

    def __init__(self, drafter: Drafter, own: Any, target: Any) -> None:
        if drafter.taps:
            raise ZerodraftError(
                f"A {type(drafter).__name__} reads the target's hidden states, so it must share its tokens: train one "
                "for this target."
            )
        for tokenizer, of in ((own, "drafter"), (target, "target")):
            if not tokenizer.is_fast:
                raise ZerodraftError(
                    f"The {of}'s tokenizer is a {type(tokenizer).__name__}, which does not tell where in the text its "
                    "tokens are: drafting through the text needs fast tokenizers."
                )
        self.drafter, self.own, self.target = drafter, own, target
        self.max_length = drafter.max_length
        more = drafter.eos_ids if isinstance(drafter, EndingDrafter) else ()
        self.eos_ids = frozenset({own.eos_token_id, *more})
        self.special_ids = frozenset(own.all_special_ids)

    def check(self, config: Any) -> None:
        """The tokenizer must be the target's."""
        size = config.get_text_config().vocab_size
        if max(self.target.get_vocab().values()) >= size:
            raise ZerodraftError(
                f"The target's tokenizer has more tokens than the {size} of its vocabulary: they do not fit."
            )

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "RetokenizedSession":
        """A session for `batch` rows."""
        return RetokenizedSession([_Row(self, device, generator) for _ in range(batch)])


class RetokenizedSession:
    """One drafter session for each row: rows re-align at different places."""

    def __init__(self, rows: list["_Row"]) -> None:
        self.rows = rows

    def observe(self, progress: Sequence[Progress]) -> None:
        """Notes the new tokens."""
        for row, news in zip(self.rows, progress, strict=True):
            row.known += news.tokens.tolist()

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """Drafts row by row."""
        return [
            row.propose(length) if length else Lattice.empty() for row, length in zip(self.rows, lengths, strict=True)
        ]

    def rewind(self, row: int, length: int) -> None:
        """Takes back the target's tokens; the drafter's follow with the next draft."""
        del self.rows[row].known[length:]


class _Row:
    """One text: the target's tokens, and the drafter's that its session has seen."""

    def __init__(self, drafter: RetokenizedDrafter, device: torch.device, generator: torch.Generator | None) -> None:
        self.drafter, self.device = drafter, device
        self.known: list[int] = []
        self.own: list[int] = []
        self.session: DraftSession = drafter.drafter.start(1, device, generator)

    def propose(self, length: int) -> Lattice:
        """A chain of at most `length` of the target's tokens."""
        drafter = self.drafter
        complete, begun = unfinished(drafter.target, self.known)
        text = decode(drafter.target, complete)
        own = encode_text(drafter.own, text)
        if not own:
            return Lattice.empty()
        self._agree(own)
        wanted = ceil(length * len(own) / max(len(self.known), 1)) + 1
        lattice = self.session.propose([min(wanted, drafter.drafter.max_length)])[0]
        drafted, log_q = lattice.ids[:, 0].tolist(), lattice.log_q[:, 0]
        end = next((i for i, token in enumerate(drafted) if token in drafter.special_ids | drafter.eos_ids), None)
        ends = end is not None and drafted[end] in drafter.eos_ids and drafter.target.eos_token_id is not None
        added, starts = added_text(drafter.own, own, drafted[:end])
        tokens, places = continuation(drafter.target, complete, added)
        scores = spread(log_q[: len(starts)], starts, places)
        if tokens[: len(begun)] != begun:
            return Lattice.empty()
        tokens, scores = tokens[len(begun) :], scores[len(begun) :]
        if ends:
            tokens, scores = [*tokens, drafter.target.eos_token_id], np.append(scores, log_q[end])
        ids = np.array(tokens[:length], np.int64)
        return Lattice(ids[:, None], scores[:length, None].astype(np.float32), chain=True)

    def _agree(self, own: list[int]) -> None:
        """Make the session know exactly these tokens."""
        same = common_prefix(self.own, own)
        # where nothing is new the session has drafted on, and must go back too
        if same < len(self.own) or same == len(own):
            self.session.rewind(0, same)
        self.own = own
        self.session.observe([Progress(torch.tensor(own[same:], dtype=torch.long, device=self.device), None)])


def retokenized_if_needed(drafter: Drafter, path: str | PathLike[str], target_path: str | PathLike[str]) -> Drafter:
    """The drafter itself where it can draft the target's tokens (see `different_tokenizers`), else wrapped."""
    pair = different_tokenizers(path, target_path)
    return drafter if pair is None else RetokenizedDrafter(drafter, *pair)


def different_tokenizers(
    path: str | PathLike[str], target_path: str | PathLike[str], *, added: bool = True
) -> tuple[Any, Any] | None:
    """The tokenizers beside a drafter and a target if they differ; None if they are the same.

    None too where one of them cannot be loaded, which is logged: they are taken to be the same then.

    Args:
        path: The drafter's directory.
        target_path: The target's directory.
        added: Whether tokens that were added to the vocabulary and that only one of them has (a mask, the marks of a
            chat) make a difference.
    """
    own, target = _tokenizer(path), _tokenizer(target_path)
    if own is None or target is None:
        where = path if own is None else target_path
        logger.warning("no tokenizer could be loaded from '%s': drafter and target are taken to share one", where)
        return None
    same = own.get_vocab() == target.get_vocab() if added else same_but_for_added(own, target)
    return None if same else (own, target)


def same_but_for_added(a: Any, b: Any) -> bool:
    """Whether two tokenizers have one vocabulary, and the same ids for the added tokens that both have."""
    added_a, added_b = a.get_added_vocab(), b.get_added_vocab()
    both = added_a.keys() & added_b.keys()
    plain_a, plain_b = (
        {token: i for token, i in tokenizer.get_vocab().items() if token not in added_a.keys() | added_b.keys()}
        for tokenizer in (a, b)
    )
    return plain_a == plain_b and all(added_a[token] == added_b[token] for token in both)


def _tokenizer(path: str | PathLike[str]) -> Any:
    folder = Path(path)
    # without files, the classes of some families make a tokenizer of next to no tokens
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    # a model that transformers does not know has nothing to say about its tokenizer
    config = None if _field(folder / "config.json", "model_type") in CONFIG_MAPPING else PreTrainedConfig()
    # Dream's tokenizer is Qwen2's, but names a class of its own, whose code would have to be run
    is_dream = _field(folder / "tokenizer_config.json", "tokenizer_class") == "DreamTokenizer"
    loader: Any = Qwen2Tokenizer if is_dream else AutoTokenizer
    try:
        return load_tokenizer_files(folder, loader, config=config)
    except ZerodraftError:
        return None


def _field(file: Path, name: str) -> Any:
    try:
        return read_json(file).get(name)
    except ZerodraftError:
        return None


def unfinished(tokenizer: Any, tokens: list[int]) -> tuple[list[int], list[int]]:
    """Tokens cut in two: those whose text is complete, and those that begin a character."""
    end = len(tokens)
    while end and decode(tokenizer, tokens[max(0, end - TAIL) : end]).endswith(UNFINISHED):
        end -= 1
    return tokens[:end], tokens[end:]


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens as it is, special tokens left out."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """A text that goes on: with the token that the tokenizer puts in front, without one that it puts at the end."""
    tokens = tokenizer(text)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(tokens) > len(plain) and tokens[-1] in tokenizer.all_special_ids and tokens[-len(plain) :] != plain:
        tokens = tokens[:-1]
    return list(tokens)


def added_text(tokenizer: Any, before: Sequence[int], drafted: Sequence[int]) -> tuple[str, list[int]]:
    """What drafted tokens add to a text, but for a character that they leave incomplete, and where each begins."""
    tail = list(before[-TAIL:])
    start = len(decode(tokenizer, tail))
    ends = [len(decode(tokenizer, [*tail, *drafted[:i]]).rstrip(UNFINISHED)) - start for i in range(len(drafted) + 1)]
    text = decode(tokenizer, [*tail, *drafted])[start:].rstrip(UNFINISHED)
    return text, [max(0, min(end, len(text))) for end in ends[:-1]]


def continuation(tokenizer: Any, tokens: Sequence[int], added: str) -> tuple[list[int], list[int]]:
    """Tokens for a text that goes on after others, and where in it each begins.

    If the tokenizer would have cut the whole text where these tokens end, they are its own; else the new part is
    encoded by itself, behind a character that it does not merge with.
    """
    if not added:
        return [], []
    before = decode(tokenizer, tokens[-TAIL:])
    for front in (before, "\n", ".", "a"):
        found = _tokens_after(tokenizer, front, added)
        if found is not None:
            return found
    return [], []


def _tokens_after(tokenizer: Any, front: str, added: str) -> tuple[list[int], list[int]] | None:
    """The tokens of `added` behind `front`; None if one of them holds a part of both."""
    encoded = tokenizer(front + added, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans, border = encoded["input_ids"], encoded["offset_mapping"], len(front)
    first = next((i for i, (_, end) in enumerate(spans) if end > border), len(ids))
    held = decode(tokenizer, ids[:first])
    # not by the spans alone: some tokenizers leave the space before a word out of its span; nor by lengths alone: a
    # token may hold the end of one character and the beginning of the next
    if (
        (front and not first)
        or held.endswith(UNFINISHED) != front.endswith(UNFINISHED)
        or decode(tokenizer, ids)[len(held) :] != added
    ):
        return None
    return ids[first:], [max(0, start - border) for start, _ in spans[first:]]


def spread(log_q: Float32[np.ndarray, "n"], starts: list[int], places: list[int]) -> Float32[np.ndarray, "m"]:
    """Log-probabilities of the drafter's tokens on the target's: each counts where it begins, so that the sum stays."""
    scores = np.zeros(len(places), np.float32)
    if len(places):
        at: Int64[np.ndarray, "n"] = np.searchsorted(places, starts, side="right") - 1
        np.add.at(scores, at.clip(0), log_q)
    return scores


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    same = min(len(a), len(b))
    return next((i for i in range(same) if a[i] != b[i]), same)
