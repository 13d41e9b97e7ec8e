"""Several residual streams between the cycles of the shared block, in place of one.

Between two cycles each stream takes in what the last cycle made, and the next one is fed with a mixture:

    Y_j <- out + keep_j * (Y_j - x) + more_j * (out - x),    x <- sum_j read_j * Y_j

where `x` is what a cycle was fed with and `out` what the block made of it; the first cycle is fed with the head's
output, as which all streams begin. The numbers are learned for each pair of cycles and depend on the token:
`bias + scale * tanh(weight @ out / |out|)`. At first `keep` is 1, `more` is 0 and one stream is read: that is the plain
loop exactly, as all streams are the same then. The tail, and a token that leaves early, see `out`.

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

SCALE = 0.01
"""How much the numbers depend on the token at first, were the weights not 0."""


class ResidualStreams(nn.Module):
    """The numbers by which streams are written and read between two cycles.

    Attributes:
        weight: `(cycles - 1, 3 * streams, d)`, for `read`, `keep` and `more` of each stream.
        bias: `(cycles - 1, 3 * streams)`.
        scale: `(cycles - 1, 3)`.
    """

    def __init__(self, config: ZttConfig) -> None:
        super().__init__()
        pairs, streams = config.cycles - 1, config.residual_streams
        self.weight = nn.Parameter(torch.zeros(pairs, 3 * streams, config.hidden_size))
        self.bias = nn.Parameter(self.start(pairs, streams))
        self.scale = nn.Parameter(torch.full((pairs, 3), SCALE))

    @staticmethod
    def start(pairs: int, streams: int) -> Float[Tensor, "pairs numbers"]:
        """The biases of plain loops; the streams are read in turn, by which they come to differ."""
        read = torch.eye(streams)[torch.arange(pairs) % streams]
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
        initialization.constant_(self.scale, SCALE)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and scale. Asked for by a call, so that a wrapper (PEFT) can answer in the module's place."""
        return self.weight, self.bias, self.scale


class StreamStates:
    """The streams of one forward pass.

    Args:
        weight: See `ResidualStreams`.
        bias: As there.
        scale: As there.
    """

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor) -> None:
        self._weight, self._bias, self._scale = weight, bias, scale
        # the streams of each token, and last what the cycle before was fed with
        self._states: Float[Tensor, "b t states d"] | None = None

    def feed(self, cycle: int, out: Float[Tensor, "b t d"], grid: TokenGrid | None = None) -> Float[Tensor, "b t d"]:
        """What a cycle (from 0) is fed with, after `out`: of the cycle before, or of the head.

        Those that have left need not be told apart: their streams are of no use any more. With `grid`, `out` is a row
        of those that run.
        """
        if cycle == 0:
            self._states = out[..., None, :].expand(*out.shape[:-1], self._bias.shape[1] // 3 + 1, -1)
            return out
        assert self._states is not None
        states = self._states if grid is None else grid.pack(self._states)
        streams, fed = states[..., :-1, :], states[..., -1:, :]
        pair, made = cycle - 1, out[..., None, :]
        weight, bias, scale = (x[pair].to(out.dtype) for x in (self._weight, self._bias, self._scale))
        by_token = F.linear(F.normalize(out, dim=-1), weight).tanh().unflatten(-1, (3, -1))
        read, keep, more = (bias.unflatten(-1, (3, -1)) + scale[:, None] * by_token)[..., None].unbind(-3)
        streams = made + keep * (streams - fed) + more * (made - fed)
        fed = (read * streams).sum(-2, keepdim=True)
        states = torch.cat([streams, fed], -2)
        self._states = states if grid is None else grid.unpack(states, into=self._states)
        return fed.squeeze(-2)
