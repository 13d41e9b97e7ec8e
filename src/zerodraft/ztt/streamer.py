"""A streamer for `generate` that pairs every new token with the depth at which it was produced.

The token at position p is the prediction of position p - 1, so its depth is the number of cycles that position p - 1
ran. Without an exit rule every token has the depth of the model.
"""

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.pieces import Decoder, TextPieces
from zerodraft.ztt.model import ZttForCausalLM


class DepthStreamer(BaseStreamer):
    """Give it to `generate(streamer=...)`; one text at a time.

    Args:
        model: The model that generates.
        tokenizer: Makes text of the tokens, for `on_text`.
        on_text: Called with every new piece of text and its depth. A token can be a part of a character: a piece is
            held back until it is whole, and its depth is that of the token that completes it.

    Attributes:
        tokens: New tokens so far.
        depths: Their depths, from 1.
    """

    def __init__(
        self,
        model: ZttForCausalLM,
        tokenizer: Decoder | None = None,
        on_text: Callable[[str, int], None] | None = None,
    ) -> None:
        if (tokenizer is None) != (on_text is None):
            raise ZerodraftError("DepthStreamer needs tokenizer and on_text together, or neither of them.")
        self.model, self.tokenizer, self.on_text = model, tokenizer, on_text
        self._start()

    def _start(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._prompt_length: int | None = None
        self._pieces = TextPieces(self.tokenizer) if self.tokenizer else None

    def put(self, value: Int[Tensor, "..."]) -> None:
        """Takes the prompt `(1, t)` first, then the new tokens as they come."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise ZerodraftError(
                f"DepthStreamer follows one text, got a batch of {value.shape[0]}; read model.last_exit after generate."
            )
        if self._prompt_length is None:
            self._start()
            self._prompt_length = value.numel()
            return
        for token in value.flatten().tolist():
            self.depths.append(self._depth(self._prompt_length + len(self.tokens) - 1))
            self.tokens.append(token)
            self._write(self._pieces.add(token) if self._pieces else "")

    def end(self) -> None:
        """Hands on what was held back; the next `put` starts a new text."""
        self._write(self._pieces.rest() if self._pieces else "")
        self._prompt_length = None

    def _depth(self, position: int) -> int:
        depths = self.model.last_exit
        return self.model.config.cycles if depths is None else int(depths[0, position])

    def _write(self, text: str) -> None:
        if text and self.on_text:
            self.on_text(text, self.depths[-1])
