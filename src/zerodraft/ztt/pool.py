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

    def forward(self, step: Step) -> Float[Tensor, "kv d"] | None:
        """The zero key of one execution of a layer, or None where it has no zero token."""
        key = self._key(step)
        # A view of a parameter requires gradients even under no_grad, and torch's FLOP counter trips over that.
        return key if key is None or torch.is_grad_enabled() else key.detach()

    def _key(self, step: Step) -> Tensor | None:
        config = self.config
        if config.is_shared(step.layer):
            cycle = step.cycle - (config.zero_token_start - 1)
            return self.keys[cycle, step.layer - config.head_layers] if cycle >= 0 else None
        if self.edge_keys is None:
            return None
        return self.edge_keys[step.layer if step.layer < config.head_layers else step.layer - config.shared_layers]
