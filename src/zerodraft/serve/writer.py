"""Tokens to an answer's text as they come: stop texts, ends, log probabilities, and the steps that brought them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from zerodraft.common.pieces import TextPieces
from zerodraft.decoding.stats import RowStep
from zerodraft.serve.sampling import Recorder, TokenScores


@dataclass(slots=True)
class Piece:
    """What a step added to an answer.

    Attributes:
        text: The text that is certain by now.
        tokens: The tokens.
        scores: Of each of them, if asked for.
        steps: The step as JSON, if asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)


class Writer:
    """One answer as it grows.

    Args:
        tokenizer: The model's.
        eos: Tokens that end a text, and are no part of it.
        stops: Texts that do.
        recorder: Knows the log probabilities.
        trace: Keep the steps.
        cycles: Of each token, where the model is a looped one, unless its step tells of less.

    Attributes:
        ended: Why there is no more to come: "stop"; empty as long as there may be.
        count: Tokens so far.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos: Collection[int] = (),
        stops: Sequence[str] = (),
        recorder: Recorder | None = None,
        *,
        trace: bool = False,
        cycles: int | None = None,
    ) -> None:
        self.tokenizer, self.eos, self.stops, self.recorder = tokenizer, eos, stops, recorder
        self.trace, self.cycles = trace, cycles
        self.ended, self.count = "", 0
        self._pieces = TextPieces(tokenizer)
        self._held, self._cut = "", False

    def add(self, row: RowStep) -> Piece:
        """What a step brought, up to where the answer ends."""
        piece = Piece()
        for token in row.tokens:
            piece.tokens.append(token)
            if self.recorder is not None:
                piece.scores.append(self.recorder.take(token))
            if token in self.eos:
                self.ended = "stop"
            else:
                piece.text += self._let_go(self._pieces.add(token))
            if self.ended:
                break
        self.count += len(piece.tokens)
        if self.trace:
            piece.steps.append(self._step(row, piece.tokens))
        return piece

    def rest(self) -> str:
        """The text that was held back, once the answer is over."""
        if self._cut:
            return ""
        text = self._let_go(self._pieces.rest())
        return text if self._cut else text + self._held

    def _let_go(self, text: str) -> str:
        """The part of the text so far that can be no part of a stop text."""
        self._held += text
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended, self._cut = "stop", True
            return self._held[: min(found)]
        most = max(map(len, self.stops), default=1) - 1
        begun = next(
            (
                n
                for n in range(min(most, len(self._held)), 0, -1)
                if any(s.startswith(self._held[-n:]) for s in self.stops)
            ),
            0,
        )
        text, self._held = self._held[: len(self._held) - begun], self._held[len(self._held) - begun :]
        return text

    def _step(self, row: RowStep, tokens: Sequence[int]) -> dict[str, Any]:
        step: dict[str, Any] = {
            "tokens": [self._token(token) for token in tokens],
            "drafted": [
                {**self._token(token), "parent": parent} for token, parent in zip(row.drafted, row.parents, strict=True)
            ],
            "accepted": row.accepted[: len(tokens)],
        }
        if self.cycles is None:
            return step
        cycles = row.cycles or [self.cycles] * len(tokens)
        return {**step, "cycles": cycles[: len(tokens)]}

    def _token(self, token: int) -> dict[str, Any]:
        return {"id": token, "text": self.tokenizer.decode([token])}
