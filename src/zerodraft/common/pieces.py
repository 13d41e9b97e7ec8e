"""Text out of tokens one by one, for what is shown while it is written."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of the ids."""
        ...


class TextPieces:
    """Tokens to text one by one; a token that is a part of a character waits for the rest of it."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        # one token of context stays, since some tokenizers write a token differently at the start of a text
        self._before: list[int] = []
        self._known = 0
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._waiting.append(token)
        text = self._text(self._waiting)
        if text.endswith(REPLACEMENT):
            return ""
        self._before, self._waiting = self._waiting[-1:], []
        self._known = len(self._tokenizer.decode(self._before, skip_special_tokens=True))
        return text

    def peek(self, tokens: Sequence[int]) -> str:
        """The text of tokens that are not added."""
        return self._text([*self._waiting, *tokens])

    def rest(self) -> str:
        """What still waits at the end."""
        return self._text(self._waiting) if self._waiting else ""

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=True)[self._known :]
