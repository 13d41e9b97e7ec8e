"""A row's text as it grows."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class Text:
    """One row: its ids as they grow, padding of the prompt included, in a buffer that others can look into."""

    def __init__(self, prompt: Int[Tensor, " T"], real: int) -> None:
        self.length = len(prompt)
        self.prompt_length = len(prompt)
        self.padding = len(prompt) - real
        self.stopped_at: int | None = None
        self.last = int(prompt[-1])
        self._hold(torch.cat([prompt, prompt.new_zeros(max(256, len(prompt)))]))

    def _hold(self, ids: Int[Tensor, " M"]) -> None:
        self._ids = ids
        # writing one number is thirty times as fast through numpy
        self._cells: Any = ids.numpy() if ids.device.type == "cpu" else ids

    def write(self, at: int, token: int) -> None:
        """Put a token at a place; it is part of the text once `length` passes it."""
        if at >= len(self._cells):
            self._hold(torch.cat([self._ids, torch.zeros_like(self._ids)]))
        self._cells[at] = token

    def ids(self, length: int | None = None) -> Int[Tensor, "1 T"]:
        """The text's ids, or the first `length` ones: a view."""
        return self._ids[None, : self.length if length is None else length]

    def add(self, token: int) -> None:
        """The text's next token."""
        self.write(self.length, token)
        self.length += 1
        self.last = token
