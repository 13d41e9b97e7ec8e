"""Per-cycle LoRA: a low-rank delta for each cycle on every projection of the shared layers.

It lets cycles that share weights differ a little (relaxed sharing: Bae et al., "Relaxed Recursive Transformers", 2024).
The deltas are added by forward hooks on the family's own projections, which read the running cycle from the layer call
that the attention of the layer announced; so nothing of the family is replaced, a PEFT adapter can wrap the same
projection, and gradient checkpointing recomputes with the right cycle. The hooks ask the model for its `cycle_lora`
when they run, so that PEFT can put a trained copy in its place. `up` starts at zero: new deltas change nothing.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization
from transformers.pytorch_utils import Conv1D

Projection = nn.Linear | Conv1D


def projections(layer: nn.Module) -> Iterator[tuple[str, Projection]]:
    """The linear maps of a decoder layer with their names in it.

    Not those that compute more than a linear map: routers that go on to choose experts (Llama 4, PhiMoE).
    """
    for name, module in layer.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in (nn.Linear.forward, Conv1D.forward):
            yield name, module


def matrix(projection: Projection) -> Float[Tensor, "out in"]:
    """The weight as `y = x @ matrix.T`; a view (GPT-2's Conv1D stores the transpose)."""
    return projection.weight if isinstance(projection, nn.Linear) else projection.weight.T


class LowRankDelta(nn.Module):
    """The deltas `up[cycle] @ down[cycle]` of one projection.

    Attributes:
        down: `(cycles, rank, in)`.
        up: `(cycles, out, rank)`.
    """

    def __init__(self, cycles: int, rank: int, projection: Projection) -> None:
        super().__init__()
        out_features, in_features = matrix(projection).shape
        self.down = nn.Parameter(torch.empty(cycles, rank, in_features))
        self.up = nn.Parameter(torch.empty(cycles, out_features, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`down` random, `up` zero; leaves alone what a checkpoint has filled."""
        initialization.normal_(self.down, std=self.down.shape[-1] ** -0.5)
        initialization.zeros_(self.up)

    def weight(self, cycle: int) -> Float[Tensor, "out in"]:
        """What the delta adds to the projection's matrix in a cycle (0-based)."""
        return self.up[cycle] @ self.down[cycle]

    def forward(self, x: Tensor, cycle: int) -> Tensor:
        """What the delta adds to the projection's output in a cycle (0-based)."""
        return F.linear(F.linear(x, self.down[cycle]), self.up[cycle])


class CycleLora(nn.Module):
    """All deltas of a model.

    Args:
        layers: The shared layers.
        cycles: How often they are run.
        rank: Rank of each delta.
    """

    def __init__(self, layers: Sequence[nn.Module], cycles: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({_key(name): LowRankDelta(cycles, rank, linear) for name, linear in projections(layer)})
            for layer in layers
        )

    def reset_parameters(self) -> None:
        """Start all deltas anew: they change nothing until they are trained."""
        for module in self.modules():
            if isinstance(module, LowRankDelta):
                module.reset_parameters()

    def forward(self, layer: int, name: str, x: Tensor, cycle: int) -> Tensor:
        """What is added to the output of a shared layer's projection in a cycle."""
        return self.delta(layer, name)(x, cycle)

    def delta(self, layer: int, name: str) -> LowRankDelta:
        """The deltas of the projection `name` of a shared layer (0: the first of the shared ones)."""
        deltas = self.layers[layer]
        assert isinstance(deltas, nn.ModuleDict)
        delta = deltas[_key(name)]
        assert isinstance(delta, LowRankDelta)
        return delta


def _key(name: str) -> str:
    return name.replace(".", "_")  # module names may not contain dots
