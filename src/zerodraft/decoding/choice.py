"""How the target's logits become its own next token: processors, then argmax or probabilities.

The processors are the model's whole stack as `generate` builds it. They are called along the accepted path alone, once
for each token of the text and in its order: what they see is what they see in plain decoding, so even those with a
memory work. Rows of a batch go on at their own pace; a processor that tells rows apart is therefore called with the row
in its place of a batch of copies.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from zerodraft.errors import ZerodraftError

ROW_WISE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
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

WITH_MEMORY = tuple(
    getattr(logits_process, name)
    for name in ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
)
"""Processors whose memory is of a whole batch that goes on in step."""


class TokenChoice:
    """Turns logits into scores, and keeps what `generate` is to return.

    Args:
        processors: What `generate` prepared.
        sample: Whether tokens are drawn (else: argmax).
        rows: Rows of the batch.
        keep_scores: Keep the processed scores of every token of the text.
        keep_logits: Keep the logits of every token of the text.

    Raises:
        ZerodraftError: processors that cannot follow rows at different paces.
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
        self._batched = rows > 1 and any(type(p) not in ROW_WISE for p in processors)
        for processor in processors:
            if rows > 1 and isinstance(processor, WITH_MEMORY):
                raise ZerodraftError(
                    f"{type(processor).__name__} remembers a batch whose rows go on in step, and speculative rows do "
                    f"not; generate the {rows} texts one by one."
                )
        self.scores: list[list[Tensor]] | None = [[] for _ in range(rows)] if keep_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in range(rows)] if keep_logits else None

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
        if not scores.max().isfinite():
            raise ZerodraftError(
                "The target's scores hold NaN or infinity, or its logits processors left no token to choose; check its "
                "weights and the generation options, or run it in a wider dtype."
            )
        return scores

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

    def so_far(self, row: int, tokens: int) -> Any:
        """The scores of a row's first new tokens as stopping criteria want them."""
        if self.scores is None:
            return None
        return tuple(scores.expand(self.rows, -1) for scores in self.scores[row][:tokens])
