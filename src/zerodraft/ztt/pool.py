"""The pool of zero tokens: one trainable key per (cycle, layer, KV head), from which each attention takes its own.

A zero token is a virtual token with this key and a value of zero (Li et al., 2025/2026). It needs no slot in the cache
and no place in the mask: `zerodraft.ztt.attention` folds it into the softmax.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zerodraft.ztt.config import Step, ZttConfig


class ZeroTokenPool(nn.Module):
    """Holds the keys of all zero tokens of a model.

    Attributes:
        keys: `(cycles with zero tokens, shared layers, KV heads, head dim)`.
        edge_keys: `(head + tail layers, KV heads, head dim)`, only with `edge_zero_tokens`.
    """

    keys: nn.Parameter
    edge_keys: nn.Parameter | None

    def __init__(self, config: ZttConfig, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config = config
        cycles = config.cycles - config.zero_token_start + 1
        self.keys = nn.Parameter(torch.zeros(cycles, config.shared_layers, kv_heads, head_dim))
        edges = config.head_layers + config.tail_layers
        self.edge_keys = nn.Parameter(torch.zeros(edges, kv_heads, head_dim)) if config.edge_zero_tokens else None

    def forward(self) -> dict[Step, Float[Tensor, "kv d"]]:
        """The zero key of every execution of a layer that has one."""
        config = self.config
        # A view of a parameter requires gradients even under no_grad, and torch's FLOP counter trips over that.
        keys, edge_keys = (
            p if p is None or torch.is_grad_enabled() else p.detach() for p in (self.keys, self.edge_keys)
        )
        assert keys is not None
        shared, edges = keys.flatten(0, 1).unbind(), () if edge_keys is None else edge_keys.unbind()
        taken = {}
        for step in config.steps():
            cycle = step.cycle - (config.zero_token_start - 1)
            if config.is_shared(step.layer):
                if cycle >= 0:
                    taken[step] = shared[cycle * config.shared_layers + step.layer - config.head_layers]
            elif edges:
                taken[step] = edges[
                    step.layer if step.layer < config.head_layers else step.layer - config.shared_layers
                ]
        return taken
