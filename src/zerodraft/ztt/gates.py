"""The gates of the extra cycles: `h + g * (layer(h) - h)` with one trainable `g` per cycle and shared layer.

They start at zero, so that the cycles of a deepened model begin as the exact identity. They are a module of their own,
not a bare parameter, because that is what PEFT's `modules_to_save` and other tools can name.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from zerodraft.ztt.config import ZttConfig


class CycleGates(nn.Module):
    """Holds the gates of a model.

    Attributes:
        weight: `(cycles - 1, shared layers)`; the first cycle has none.
    """

    def __init__(self, config: ZttConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.cycles - 1, config.shared_layers))

    def reset_parameters(self) -> None:
        """Close all gates; leaves alone what a checkpoint has filled."""
        initialization.zeros_(self.weight)

    def forward(self) -> Float[Tensor, "cycles layers"]:
        """The gates themselves. Asked for by a call, so that a wrapper (PEFT) can answer in the module's place."""
        return self.weight
