"""From a request to the arguments of `generate`: how the next token is chosen.

What OpenAI's form has and transformers has not are logits processors here. They are functions of the text so far, and
under drafts they see the draft's beginning at every place of it, as `decoding.instep` calls them.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from zerodraft.serve.api import Asked

NEVER = -9999.0
"""What OpenAI writes for the logarithm of 0, which JSON has not."""

PIECE = 128
"""Tokens of a prompt that are read at once; other requests take a step in between."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The model's own log probability of a token, and the most probable ones, best first."""

    logprob: float
    top: list[tuple[int, float]]


class Recorder(LogitsProcessor):
    """Notes the model's distribution of every token of the text; called first, it sees what nothing has changed yet."""

    def __init__(self, alternatives: int) -> None:
        self.alternatives = alternatives
        self._rows: deque[Tensor] = deque()

    def __call__(self, input_ids: Int[Tensor, "1 T"], scores: Float[Tensor, "1 V"]) -> Float[Tensor, "1 V"]:
        self._rows.append(scores[0].float().log_softmax(-1))
        return scores

    def take(self, token: int) -> TokenScores:
        """Of the next token of the text."""
        row = self._rows.popleft()
        top = row.topk(self.alternatives) if self.alternatives else ([], [])
        pairs = [(int(i), max(float(logprob), NEVER)) for logprob, i in zip(*top, strict=True)]
        return TokenScores(max(float(row[token]), NEVER), pairs)


class Changes(LogitsProcessor):
    """OpenAI's `logit_bias`, `frequency_penalty` and `presence_penalty`: what is added to the scores, or taken away.

    Args:
        prompt: Tokens of the prompt, which are not counted.
        frequency: Taken from a token's score for each time that it was written.
        presence: Taken once from those that were.
        bias: Added, by token.
    """

    def __init__(self, prompt: int, frequency: float, presence: float, bias: Mapping[int, float]) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence
        self.biased, self.bias = torch.tensor([*bias], dtype=torch.long), torch.tensor([*bias.values()])

    def __call__(self, input_ids: Int[Tensor, "1 T"], scores: Float[Tensor, "1 V"]) -> Float[Tensor, "1 V"]:
        tokens, counts = input_ids[0, self.prompt :].unique(return_counts=True)
        taken = self.frequency * counts.to(scores) + self.presence
        scores = scores.index_add(1, tokens, -taken[None])
        return scores.index_add(1, self.biased.to(scores.device), self.bias.to(scores)[None])


def arguments_of(
    asked: Asked, prompt: int, new: int, recorder: Recorder | None, grammar: LogitsProcessor | None = None
) -> dict[str, Any]:
    """The arguments of `generate` for a prompt of `prompt` tokens and an answer of at most `new`."""
    processors: list[Any] = [] if recorder is None else [recorder]
    if asked.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(asked.repetition_penalty))
    if asked.frequency_penalty or asked.presence_penalty or asked.logit_bias:
        bias = {int(token): value for token, value in asked.logit_bias.items()}
        processors.append(Changes(prompt, asked.frequency_penalty, asked.presence_penalty, bias))
    if grammar is not None:
        processors.append(grammar)
    arguments: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": asked.temperature > 0,
        "prefill_chunk_size": PIECE,
        "logits_processor": LogitsProcessorList(processors),
    }
    if asked.temperature > 0:
        arguments |= {
            "temperature": float(asked.temperature),
            "top_p": float(asked.top_p),
            "top_k": max(asked.top_k, 0),
        }
        if asked.min_p:
            arguments["min_p"] = float(asked.min_p)
    return arguments
