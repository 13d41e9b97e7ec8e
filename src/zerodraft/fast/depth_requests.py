"""What goes into a batch over depth and what comes out: requests, how their prompts are read, answers as they grow."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.text import Text
from zerodraft.fast.compiled import CPU
from zerodraft.fast.lean.cache import LeanCache
from zerodraft.fast.lean.exits import EarlyExit
from zerodraft.fast.lean.weights import LeanWeights


def check_count(name: str, value: Any) -> None:
    """Raise `ZerodraftError` unless an argument is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ZerodraftError(f"{name}={value!r} must be a whole number of at least 1.")


def tokens_of(name: str, value: Any) -> list[int]:
    """An argument that is some tokens, as a list; raises `ZerodraftError` where it is none."""
    try:
        return [operator.index(token) for token in value]
    except (TypeError, ValueError):
        raise ZerodraftError(
            f"{name}={value!r} is no list of tokens; give whole numbers, of a tensor by ids[0].tolist()."
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRequest:
    """A prompt to be continued, greedily unless it has a choice of its own.

    `choose` and `stops` are called once for each token, in order, whatever else is in the batch, so they may remember.
    What they raise ends this request alone. `zerodraft.depth_request` makes a request of the arguments of `generate`.

    Args:
        prompt: Its tokens, at least one.
        max_new_tokens: How many tokens at most are wanted.
        ends: Tokens that end the text; such a token is the answer's last.
        choose: The next token, from the text so far (1, T) and its logits (V,); None: the most probable one.
        stops: Whether the text so far (1, T) is finished.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    choose: Callable[[Int[Tensor, "1 T"], Float[Tensor, " V"]], int] | None = None
    stops: Callable[[Int[Tensor, "1 T"]], bool] | None = None

    def __post_init__(self) -> None:
        # a list of its own, whatever becomes of the one that was given
        object.__setattr__(self, "prompt", tokens_of("prompt", self.prompt))
        if not self.prompt:
            raise ZerodraftError("The prompt is empty; give at least one token.")
        check_count("max_new_tokens", self.max_new_tokens)
        object.__setattr__(self, "ends", frozenset(tokens_of("ends", self.ends)))

    @property
    def slots(self) -> int:
        """Tokens that it may have in the cache: the last new one is never read."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(kw_only=True, slots=True)
class DepthAnswer:
    """What became of a request, so far.

    Attributes:
        tokens: The new ones.
        depths: The cycles behind each: those of the token before it.
        finish_reason: `"stop"` if a token of its ends came or it `stops`, `"length"` if it has as many as were wanted,
            `"error"` if its choice raised; None: it goes on.
        error: What was raised.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: Exception | None = None


class DepthPrompt:
    """A request whose prompt is read before it joins the batch: all at once, or in pieces while others are at work.
    See `DepthBatch.prompt`.

    Attributes:
        batch: What it is read for.
        request: Whose it is.
        left: Tokens that are not read yet.
    """

    def __init__(self, batch: Any, request: DepthRequest, weights: LeanWeights, early: EarlyExit | None) -> None:
        self.batch, self.request, self.left = batch, request, len(request.prompt)
        assert weights.stages is not None
        self._weights, self._early = weights, early
        self._cache = LeanCache(weights)
        self._last, self._depth = torch.empty(0), weights.stages.cycles

    @torch.inference_mode()
    def read(self, tokens: int | None = None) -> bool:
        """Reads this many more tokens, or all that are left; returns whether these were the last ones.

        Raises:
            ZerodraftError: `tokens` is below 1.
        """
        if tokens is not None:
            check_count("tokens", tokens)
        weights, cache = self._weights, self._cache
        piece = self.request.prompt[len(self.request.prompt) - self.left :][:tokens]
        if not piece:
            return not self.left
        cache.make_room(1, len(piece))
        places = cache.tokens(torch.arange(len(piece), device=CPU)[None], None)
        x = F.embedding(torch.tensor(piece, device=CPU), weights.embedding)
        how: Any = {"head_output": torch.empty_like(x) if weights.feeds_again else None, "last_only": True}
        if self._early is None:
            ran = weights.run.run(x, cache.kv, places, range(len(weights.layers)), **how)
        else:
            ran, depths = self._early.run(x, cache.kv, places, real=None, taps=(), **how)
            self._depth = int(depths[-1])
        self._last = ran.x[-1:]
        # not before: after a rule that raised, the same piece can be read again
        cache.keep([range(len(piece))])
        self.left -= len(piece)
        return not self.left

    def settle(self, kv: Float[Tensor, "E nk2 S D"]) -> tuple[Float[Tensor, "1 V"], int]:
        """Reads what is left and copies keys and values; the logits of the first new token, and the cycles behind."""
        self.read()
        count = len(self.request.prompt)
        kv[:, :, :count] = self._cache.kv[:, 0, :, :count]
        return self._weights.logits(self._last), self._depth


class DepthText:
    """An answer in the making: each token as its request chooses it."""

    def __init__(self, key: int, request: DepthRequest) -> None:
        self.key, self.request, self.answer = key, request, DepthAnswer()
        asks = request.choose is not None or request.stops is not None
        self._text = Text(torch.tensor(request.prompt), len(request.prompt)) if asks else None

    def add(self, likeliest: int, logits: Float[Tensor, " V"], depth: int) -> int:
        """The next token; the answer has it, and says whether it is the last. What a choice raises, it has too."""
        request, answer = self.request, self.answer
        try:
            token, stops = self._next(likeliest, logits)
        except Exception as error:
            # the others go on
            answer.finish_reason, answer.error = "error", error
            return likeliest
        answer.tokens.append(token)
        answer.depths.append(depth)
        if stops:
            answer.finish_reason = "stop"
        elif len(answer.tokens) == request.max_new_tokens:
            answer.finish_reason = "length"
        return token

    def _next(self, token: int, logits: Tensor) -> tuple[int, bool]:
        request, text = self.request, self._text
        if text is None:
            return token, token in request.ends
        if request.choose is not None:
            given: object = request.choose(text.ids(), logits)
            try:
                token = operator.index(given)  # pyright: ignore[reportArgumentType]  # whatever it is
            except TypeError:
                raise ZerodraftError(f"choose gave {given!r}; expected a token, as a whole number.") from None
            if not 0 <= token < len(logits):
                raise ZerodraftError(f"choose gave token {token}; expected one of the vocabulary of {len(logits)}.")
        text.add(token)
        return token, token in request.ends or (request.stops is not None and request.stops(text.ids()))
