"""Answers in a form: JSON, or JSON after a schema. What may follow is computed by llguidance.

The processor is called for every token of the text with all that is before it, under drafts for each accepted beginning
of a draft (`decoding.instep`), so a drafted token that breaks the form is rejected like any other wrong one.
"""

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llguidance.hf
import numpy as np
import torch
from jaxtyping import Float, Int
from llguidance import LLMatcher
from torch import Tensor
from transformers import LogitsProcessor

from zerodraft.common.errors import ZerodraftError, why
from zerodraft.serve.api import ApiError, ResponseFormat

SPACES = r"[ \n]{1,32}"
"""Where JSON may have space. Without an end a small model writes nothing else for ever."""


class Grammar(LogitsProcessor):
    """Leaves only those tokens with which the answer can still come to its form.

    Args:
        matcher: Has read nothing yet.
        prompt: Tokens of the prompt.
    """

    def __init__(self, matcher: LLMatcher, prompt: int) -> None:
        self.matcher, self._read = matcher, prompt

    def __call__(self, input_ids: Int[Tensor, "1 T"], scores: Float[Tensor, "1 V"]) -> Float[Tensor, "1 V"]:
        new = input_ids[0, self._read :].tolist()
        self._read += len(new)
        if new and not self.matcher.consume_tokens(new):
            raise ZerodraftError(f"The answer violates its format: {self.matcher.get_error()}")
        allowed = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8)[: scores.shape[1]]
        refused = np.ones(scores.shape[1], bool)
        refused[: len(allowed)] = allowed == 0
        return scores.masked_fill(torch.from_numpy(refused).to(scores.device), -torch.inf)


class Grammars:
    """Makes them for a model. Threads may share it.

    Args:
        tokenizer: The model's.
        vocabulary: Tokens that the model has.
        eos: Those that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> None:
        self.tokenizer, self.vocabulary, self.eos = tokenizer, vocabulary, eos
        self._lock = threading.Lock()

    @cached_property
    def _tokens(self) -> Any:
        return llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=list(self.eos))

    def matcher(self, form: ResponseFormat | None) -> LLMatcher | None:
        """What follows an answer of this form from its beginning; None: it has no form.

        Raises:
            ApiError: the schema is none, or holds what cannot be followed.
        """
        if form is None or form.type == "text":
            return None
        if not self.eos:
            raise ApiError(400, "This model has no end token, which answers in a form need.", "response_format")
        schema = {"type": "object"} if form.json_schema is None else form.json_schema.json_schema
        try:
            with self._lock:
                grammar = LLMatcher.grammar_from_json_schema(
                    json.dumps(schema), overrides={"whitespace_pattern": SPACES}
                )
                matcher = LLMatcher(self._tokens, grammar, log_level=0)
            wrong = matcher.get_error()
        except Exception as error:
            # llguidance raises what it likes over a schema
            wrong = why(error)
        if wrong:
            raise ApiError(
                400, f"'response_format' has a schema that cannot be followed: {wrong[:300]}", "response_format"
            )
        return matcher
