"""No drafts: plain decoding by our engine, on the fastest exact path that the machine has."""

from collections.abc import Sequence
from typing import Any

import torch

from zerodraft.decoding.lattice import Lattice


class NoDrafter:
    """Drafts nothing."""

    taps: Sequence[int] = ()
    max_length = 1

    def check(self, config: Any) -> None:
        """Fits every target."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "NoDrafter":
        """Has no state."""
        return self

    def observe(self, progress: Any) -> None:
        """Learns nothing."""

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """Nothing, for every row."""
        return [Lattice.empty() for _ in lengths]

    def rewind(self, row: int, length: int) -> None:
        """Knew nothing."""
