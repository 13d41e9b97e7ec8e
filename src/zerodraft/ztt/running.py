"""Who still runs in a forward pass with early exit: states, places and depths of tokens, which change together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from zerodraft.ztt.interface import TokenGrid


@dataclass(kw_only=True, slots=True)
class Running:
    """Which tokens of a forward pass with early exit still run, and the states of all.

    Attributes:
        hidden: `(b, t, d)`, the last states of those that have stopped; of the others as they were last laid out.
        states: Of the running tokens: like `hidden` while all run, else `(1, n, d)`.
        depth: `(b * t,)`, the cycles of each token: the one under way if it runs, 0 for padding.
        padded: Whether there is padding.
        grid: Places of the running tokens; None while all run.
    """

    hidden: Tensor
    states: Tensor
    depth: Tensor
    padded: bool
    grid: TokenGrid | None = None

    @classmethod
    def start(cls, hidden: Tensor, real: Tensor | None) -> "Running":
        """All run, padding too. `real` is `(b, t)` bool, False for padding, or None."""
        padded = real is not None and not bool(real.all())
        counted = real if padded and real is not None else hidden.new_ones(hidden.shape[:2])
        depth = counted.expand(hidden.shape[:2]).long().flatten()
        return cls(hidden=hidden, states=hidden, depth=depth, padded=padded)

    def at(self, index: Tensor) -> TokenGrid:
        """The tokens at these places."""
        rows, columns = self.hidden.shape[:2]
        return TokenGrid(index, rows, columns)

    def asked(self) -> TokenGrid | None:
        """Whom the rule is asked about, None for all: padding runs the first cycle with the others and leaves without
        being asked."""
        return self.at(self.depth.nonzero()[:, 0]) if self.padded and self.grid is None else self.grid

    def lay_out(self) -> Tensor:
        """`hidden`, with the running tokens' states in their places."""
        self.hidden = self.states if self.grid is None else self.grid.unpack(self.states, into=self.hidden)
        return self.hidden

    def go_on(self, cycle: int) -> None:
        """Those that run begin a cycle, counted from 1."""
        self.depth[... if self.grid is None else self.grid.index] = cycle

    def stop(self, asked: TokenGrid | None, stops: Tensor) -> TokenGrid:
        """Of those asked, those of `stops` (`(n,)` bool) stop and the rest run in one row; returns the stopped."""
        hidden = self.lay_out()
        index = torch.arange(len(self.depth), device=hidden.device) if asked is None else asked.index
        self.grid = self.at(index[~stops])
        self.states = self.grid.pack(hidden)
        return self.at(index[stops])

    def stop_all(self) -> None:
        """Nobody runs any more."""
        self.states, self.grid = self.lay_out(), None
