"""Several residual streams between the cycles of the shared block, mixed where a cycle begins and where it ends.

`x = sum_j read_j * Y_j` is what a cycle is fed with, `out` is what the block makes of it, and then each stream becomes
`Y_j <- out + keep_j * (Y_j - x) + more_j * (out - x)`. All streams begin as the output of the head; their mean goes to
the tail. The numbers are learned for each cycle and depend on the token: `bias + tanh(weight @ y)`, where `y` is all
streams of the token side by side, of length 1. At first the weights are 0, `keep` is 1 and `more` 0, and each cycle
reads one stream: that is the plain loop exactly, as all streams are then the same.

Idea: hyper-connections (Zhu et al. 2024, arXiv:2409.19606), of which only those between loops are left (Hyperloop
Transformers, arXiv:2604.21254); the form is ours, chosen so that a deepened model starts as its base model.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from zerodraft.ztt.config import ZttConfig
from zerodraft.ztt.interface import TokenGrid


class ResidualStreams(nn.Module):
    """The numbers by which streams are mixed, of all cycles.

    Attributes:
        weight: `(cycles, 3 * streams, streams * d)`, for `read`, `keep` and `more` of each stream.
        bias: `(cycles, 3 * streams)`.
    """

    def __init__(self, config: ZttConfig) -> None:
        super().__init__()
        cycles, streams, width = config.cycles, config.residual_streams, config.hidden_size
        self.weight = nn.Parameter(torch.zeros(cycles, 3 * streams, streams * width))
        self.bias = nn.Parameter(self.start(cycles, streams))

    @staticmethod
    def start(cycles: int, streams: int) -> Float[Tensor, "cycles numbers"]:
        """The biases of plain loops; cycles read the streams in turn, by which these come to differ."""
        read = torch.eye(streams)[torch.arange(cycles) % streams]
        return torch.cat([read, torch.ones_like(read), torch.zeros_like(read)], 1)

    @property
    def is_plain(self) -> bool:
        """Whether all this changes nothing, as at first."""
        start = self.start(len(self.bias), self.bias.shape[1] // 3).to(self.bias)
        return not bool(self.weight.any()) and torch.equal(self.bias, start)

    def reset_parameters(self) -> None:
        """Back to plain loops; leaves alone what a checkpoint has filled."""
        initialization.zeros_(self.weight)
        initialization.copy_(self.bias, self.start(len(self.bias), self.bias.shape[1] // 3))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Weight and bias. Asked for by a call, so that a wrapper (PEFT) can answer in the module's place."""
        return self.weight, self.bias


class StreamStates:
    """The streams of one forward pass.

    Args:
        weight: See `ResidualStreams`.
        bias: As there.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        # of all tokens; of those that run the cycle under way, with what it was fed and the other two numbers
        self._all: Float[Tensor, "b t streams d"] | None = None
        self._running: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def begin(
        self, cycle: int, hidden: Float[Tensor, "b t d"], grid: TokenGrid | None = None
    ) -> Float[Tensor, "b t d"]:
        """What a cycle (from 0) is fed with; `hidden` is the head's output or a row of tokens that still run."""
        if cycle == 0:
            self._all = hidden[..., None, :].expand(*hidden.shape[:-1], self._bias.shape[1] // 3, -1)
        assert self._all is not None
        states = self._all if grid is None else grid.pack(self._all)
        numbers = F.linear(F.normalize(states.flatten(-2), dim=-1), self._weight[cycle].to(states.dtype))
        numbers = self._bias[cycle].to(states.dtype) + numbers.tanh()
        read, keep, more = numbers.unflatten(-1, (3, -1, 1)).unbind(-3)
        fed = (read * states).sum(-2)
        self._running = states, fed[..., None, :], keep, more
        return fed

    def end(
        self, out: Float[Tensor, "b t d"], grid: TokenGrid | None = None, running: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        """The mean of the streams after a cycle that returned `out`. With `running`, `(b, t)` bool, the streams of the
        other tokens stay, and what is returned for these is of no use."""
        assert self._all is not None
        assert self._running is not None
        states, fed, keep, more = self._running
        made = out[..., None, :]
        apart = keep * (states - fed) + more * (made - fed)
        new = made + apart
        if running is not None:
            new = torch.where(running[..., None, None], new, states)
        self._all = new if grid is None else grid.unpack(new, into=self._all)
        # their mean, which is exactly `out` while all streams are the same
        return out + apart.mean(-2)
