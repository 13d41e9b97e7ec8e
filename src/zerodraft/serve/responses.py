"""What answers look like: OpenAI's JSON for chats and completions, whole and in pieces.

Beside OpenAI's fields there are `timings` (llama.cpp's names) and, for requests that ask for a trace, `zerodraft`.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zerodraft.serve.sampling import TokenScores
from zerodraft.serve.scheduler import End
from zerodraft.serve.writer import Piece


@dataclass(slots=True)
class Answer:
    """All that came of one choice."""

    piece: Piece = field(default_factory=Piece)
    end: End | None = None

    def add(self, piece: Piece) -> None:
        """One more piece."""
        self.piece.text += piece.text
        self.piece.tokens += piece.tokens
        self.piece.scores += piece.scores
        self.piece.steps += piece.steps


class Shape:
    """The JSON of one response.

    Args:
        chat: A chat's, or a completion's.
        model: What the model is called.
        prompts: What is answered.
        n: How many answers each of them has.
        tokenizer: The model's, for tokens as texts.
        scored: Whether log probabilities are wanted.
        traced: Whether steps are.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        prompts: Sequence[Sequence[int]],
        n: int,
        tokenizer: Any,
        scored: bool,
        traced: bool,
    ) -> None:
        self.prompt_tokens, self.n = sum(map(len, prompts)), n
        self.chat, self.model, self.tokenizer, self.scored, self.traced = chat, model, tokenizer, scored, traced
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A response in one piece; every answer has its end."""
        ends = [answer.end for answer in answers if answer.end is not None]
        choices = [
            {**self._choice(index, answer.piece, end.reason), **self._traced(answer.piece)}
            for index, (answer, end) in enumerate(zip(answers, ends, strict=True))
        ]
        return {**self._head(""), "choices": choices, "usage": self._usage(ends), "timings": timings(ends)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a chat's choice."""
        delta = {"role": "assistant", "content": ""}
        return {**self._head(".chunk"), "choices": [{"index": index, "delta": delta, "finish_reason": None}]}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        return {**self._head(".chunk"), "choices": [self._choice(index, piece, None, part=True)], **self._traced(piece)}

    def last(self, index: int, end: End) -> dict[str, Any]:
        """The end of a choice."""
        choice = self._choice(index, Piece(text=end.text), end.reason, part=True)
        return {**self._head(".chunk"), "choices": [choice], "timings": timings([end])}

    def closing(self, ends: Sequence[End]) -> dict[str, Any]:
        """What the whole response took."""
        return {**self._head(".chunk"), "choices": [], "usage": self._usage(ends), "timings": timings(ends)}

    def _usage(self, ends: Sequence[End]) -> dict[str, Any]:
        """OpenAI's counts: a prompt counts once, however many answers it has, and is cached as far as it was for these
        on the average."""
        new = sum(end.new_tokens for end in ends)
        reused = sum(end.stats.reused_tokens for end in ends if end.stats is not None)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": reused // self.n},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        what = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self._id, "object": what, "created": self._created, "model": self.model}

    def _choice(self, index: int, piece: Piece, reason: str | None, *, part: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if not self.chat:
            choice["text"] = piece.text
        elif part:
            choice["delta"] = {"content": piece.text} if piece.text else {}
        else:
            choice["message"] = {"role": "assistant", "content": piece.text}
        choice["logprobs"] = self._logprobs(piece) if self.scored else None
        return {**choice, "finish_reason": reason}

    def _traced(self, piece: Piece) -> dict[str, Any]:
        return {"zerodraft": {"trace": piece.steps}} if self.traced else {}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        pairs = list(zip(piece.tokens, piece.scores, strict=True))
        if self.chat:
            return {"content": [{**self._scored(token, s.logprob), "top_logprobs": self._top(s)} for token, s in pairs]}
        return {
            "tokens": [self._text(token) for token, _ in pairs],
            "token_logprobs": [s.logprob for _, s in pairs],
            "top_logprobs": [{self._text(token): logprob for token, logprob in s.top} for _, s in pairs],
        }

    def _top(self, scores: TokenScores) -> list[dict[str, Any]]:
        return [self._scored(token, logprob) for token, logprob in scores.top]

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])


def timings(ends: Sequence[End]) -> dict[str, Any]:
    """llama.cpp's names: what the choices took together, in milliseconds, and what became of their drafts."""
    stats = [end.stats for end in ends if end.stats is not None]
    read = sum(s.prompt_tokens - s.reused_tokens for s in stats)
    new, prompt_ms = sum(end.new_tokens for end in ends), 1e3 * sum(s.seconds["prefill"] for s in stats)
    predicted_ms = 1e3 * max((end.seconds for end in ends), default=0.0)
    return {
        "cache_n": sum(s.reused_tokens for s in stats),
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "predicted_n": new,
        "predicted_ms": predicted_ms,
        "predicted_per_second": 1e3 * new / predicted_ms if predicted_ms else None,
        "draft_n": sum(s.drafted for s in stats),
        "draft_n_accepted": sum(s.accepted for s in stats),
    }
