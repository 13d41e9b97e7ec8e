"""How the target's logits become its own next token: processors, then argmax or probabilities.

The processors are the model's whole stack as `generate` builds it. They are called along the accepted path alone. Those
known here are functions of a text, so rows of a batch can go on at their own pace; any other may remember what it was
called with, and is called as in plain decoding (see `instep.py`).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from zerodraft.common.errors import ZerodraftError

ROW_WISE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TopHLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "NoRepeatNGramLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "LogitNormalization",
    )
)
"""Processors that do the same to every row and remember nothing."""

PLACED = tuple(
    getattr(logits_process, name)
    for name in (
        "RepetitionPenaltyLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
    )
)
"""Processors that remember nothing either, but know each row's prompt by its place in the batch."""


def may_remember(processors: LogitsProcessorList) -> bool:
    """Whether any of the processors is not known to be a function of a text and its row."""
    return any(type(processor) not in ROW_WISE + PLACED for processor in processors)


class TokenChoice:
    """Turns logits into scores, and keeps what `generate` is to return.

    Args:
        processors: What `generate` prepared.
        sample: Whether tokens are drawn (else: argmax).
        rows: Rows of the batch.
        keep_scores: Keep the processed scores of every token of the text.
        keep_logits: Keep the logits of every token of the text.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        *,
        sample: bool,
        rows: int,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.processors, self.sample, self.rows = processors, sample, rows
        # a processor that tells rows apart is called with the row in its place of a batch of copies
        self._batched = rows > 1 and any(type(p) in PLACED for p in processors)
        self.scores: list[list[Tensor]] | None = [[] for _ in range(rows)] if keep_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in range(rows)] if keep_logits else None
        self._together: list[Tensor] = []

    @property
    def plain(self) -> bool:
        """Whether the token is simply the argmax of the logits and nothing has to be kept."""
        return not (self.processors or self.sample or self.scores or self.logits)

    def process(self, row: int, ids: Int[Tensor, "1 T"], logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """The scores of the token after a text; the call counts as that token's."""
        processors: Any = self.processors
        raw = logits.to(torch.float32, copy=True).to(ids.device)
        if self.logits is not None:
            self.logits[row].append(raw.clone())
        if self._batched:
            scores = processors(ids.expand(self.rows, -1), raw.expand(self.rows, -1).clone())[row]
        else:
            scores = processors(ids, raw[None])[0]
        if self.scores is not None:
            self.scores[row].append(scores)
        _check(scores)
        return scores

    def process_together(self, ids: Int[Tensor, "B T"], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The same for all rows in one call, as plain decoding makes it."""
        processors: Any = self.processors
        raw = logits.to(torch.float32, copy=True).to(ids.device)
        scores = processors(ids, raw.clone() if self.logits is not None else raw)
        for kept, new in ((self.logits, raw), (self.scores, scores)):
            if kept is not None:
                for of_row, value in zip(kept, new, strict=True):
                    of_row.append(value)
        if self.scores is not None:
            self._together.append(scores)
        _check(scores)
        return scores

    @property
    def so_far_together(self) -> tuple[Float[Tensor, "B V"], ...] | None:
        """The scores of all new tokens as stopping criteria want them, where rows go in step."""
        return None if self.scores is None else tuple(self._together)

    def cut(self, row: int, tokens: int) -> None:
        """Forget what was kept of a row beyond its first `tokens` new tokens."""
        for kept in (self.scores, self.logits):
            if kept is not None:
                del kept[row][tokens:]

    def kept(self, what: list[list[Tensor]] | None, tokens: int) -> tuple[Tensor, ...] | None:
        """Scores or logits as `generate` returns them: for each new token (B, V); zeros for rows that had ended."""
        if what is None:
            return None
        blank = torch.zeros_like(what[0][0])
        return tuple(torch.stack([row[i] if i < len(row) else blank for row in what]) for i in range(tokens))


def _check(scores: Float[Tensor, "*B V"]) -> None:
    if not bool(scores.amax(-1).isfinite().all()):
        raise ZerodraftError(
            "The target's scores hold NaN or infinity, or its logits processors left no token to choose; check its "
            "weights and the generation options, or run it in a wider dtype."
        )
