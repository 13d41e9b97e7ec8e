"""One trainable number per cycle of the shared block: what goes in again at its start, and what counts at its end.

`x <- s_c * block(x + g_c * e)`, where `e` is the output of the head. Input injection (`g`) keeps what the text says in
reach of every cycle (Yang et al., "Looped Transformers are Better at Learning Learning Algorithms", 2023); the scales
(`s`) weigh what a cycle made against what is added after it. Modules, not bare parameters: see `zerodraft.ztt.gates`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from zerodraft.ztt.config import ZttConfig


class CycleScalars(nn.Module):
    """Holds one number for each of `count` cycles, all `start` at first.

    Attributes:
        weight: `(count,)`.
    """

    def __init__(self, count: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((count,), start))

    def reset_parameters(self) -> None:
        """Back to the start; leaves alone what a checkpoint has filled."""
        initialization.constant_(self.weight, self.start)

    def forward(self) -> Float[Tensor, " cycles"]:
        """The numbers. Asked for by a call, so that a wrapper (PEFT) can answer in the module's place."""
        return self.weight


class InputInjection(CycleScalars):
    """How much of the head's output is added at the start of each cycle; the first has it as its input anyway."""

    def __init__(self, config: ZttConfig) -> None:
        super().__init__(config.cycles - 1, float(config.input_injection_start))


class CycleScales(CycleScalars):
    """What the block's output is multiplied by at the end of each cycle, the first one included."""

    def __init__(self, config: ZttConfig) -> None:
        super().__init__(config.cycles, 1.0)
