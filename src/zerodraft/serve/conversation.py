"""From texts and conversations to the tokens of a prompt, within the server's limits."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import context_of
from zerodraft.models.tokenizers import templated
from zerodraft.serve.api import ApiError, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt_tokens: Tokens of a prompt.
        total_tokens: Tokens of a prompt and its answer.
    """

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, model: Any, prompt_tokens: int | None, total_tokens: int | None) -> "Limits":
        """The given ones, within what the model has positions for."""
        context = context_of(model.config)
        known = [limit for limit in (total_tokens, context) if limit is not None and limit > 0]
        total = min(known, default=4096)
        return cls(prompt_tokens=min(prompt_tokens or total, total - 1), total_tokens=total)

    def answer(self, prompt: int, wanted: int | None, param: str) -> int:
        """How long an answer to a prompt of this many tokens may be.

        Raises:
            ApiError: more is wanted than fits.
        """
        room = self.total_tokens - prompt
        if wanted is not None and wanted > room:
            raise ApiError(
                400,
                f"'{param}' is {wanted}; prompt ({prompt} tokens) and answer can have {self.total_tokens} together.",
                param,
                "context_length_exceeded",
            )
        return room if wanted is None else wanted


class Prompts:
    """Makes tokens of what requests hold. Threads may share it.

    Args:
        tokenizer: The model's.
        vocabulary: Tokens that the model has.
        limits: Of the server.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, limits: Limits) -> None:
        self.tokenizer, self.vocabulary, self.limits = tokenizer, vocabulary, limits
        # a tokenizer that is used by two threads at once may refuse
        self._lock = threading.Lock()

    def of_messages(self, messages: Sequence[Message]) -> list[int]:
        """A conversation, up to where the model answers.

        Raises:
            ApiError: there is no template, or it takes no such conversation, or it is too long.
        """
        if not self.tokenizer.chat_template:
            raise ApiError(400, "This model has no chat template; use /v1/completions.", "messages")
        try:
            with self._lock:
                ids = templated(self.tokenizer, [_plain(message) for message in messages], return_dict=False)
        except ZerodraftError as error:
            raise ApiError(400, str(error), "messages") from None
        return self.checked(ids, "messages")

    def of_text(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """A text, or tokens as they are.

        Raises:
            ApiError: it is empty, too long, or holds tokens that the model has not.
        """
        if isinstance(prompt, list):
            return self.checked(prompt, "prompt")
        with self._lock:
            return self.checked(self.tokenizer(prompt, add_special_tokens=special)["input_ids"], "prompt")

    def checked(self, ids: list[int], param: str) -> list[int]:
        """The same tokens, if they can be read."""
        if not ids:
            raise ApiError(400, f"'{param}' comes to no tokens; give some text.", param)
        if max(ids) >= self.vocabulary:
            raise ApiError(400, f"'{param}' holds token {max(ids)}; the model has {self.vocabulary}.", param)
        if len(ids) > self.limits.prompt_tokens:
            raise ApiError(
                400,
                f"'{param}' has {len(ids)} tokens; at most {self.limits.prompt_tokens} are read. Shorten it.",
                param,
                "context_length_exceeded",
            )
        return ids


def _plain(message: Message) -> dict[str, str]:
    """As templates know them."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    # OpenAI's newer name, which no template knows
    return {"role": "system" if message.role == "developer" else message.role, "content": text}
