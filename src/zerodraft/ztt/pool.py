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
        plan, cycles = config.plan(), config.cycles - config.zero_token_start + 1
        self.keys = nn.Parameter(torch.zeros(cycles, config.shared_layers, kv_heads, head_dim))
        edges = plan.head + plan.tail if config.edge_zero_tokens else ()
        self.edge_keys = nn.Parameter(torch.zeros(len(edges), kv_heads, head_dim)) if edges else None
        # The steps in the order of the keys: by cycle, then by layer, whatever the schedule.
        by_cycle = sorted(plan.shared, key=lambda step: (step.cycle, step.layer))
        self.steps = (*(step for step in by_cycle if step.cycle + 1 >= config.zero_token_start), *edges)

    def forward(self) -> dict[Step, Float[Tensor, "kv d"]]:
        """The zero key of every execution of a layer that has one."""
        parts = [self.keys.flatten(0, 1)] + ([] if self.edge_keys is None else [self.edge_keys])
        if not torch.is_grad_enabled():
            # A view of a parameter requires gradients even under no_grad, and torch's FLOP counter trips over that.
            parts = [part.detach() for part in parts]
        keys = [key for part in parts for key in part.unbind()]
        return dict(zip(self.steps, keys, strict=True))
