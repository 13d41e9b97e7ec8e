"""The zero token on vLLM's own attention kernels, by one more dimension of the heads and an attention sink.

A sink is a token of value zero whose score is a fixed number of each head; the zero token's score `s0 = q.k0` differs
from query to query. Softmax does not change when all scores are shifted, so `-s0` is added to the scores of the real
tokens, and the sink's score is 0:

    q' = [q, -s0]    k' = [k, 1]    v' = [v, 0]    sink = 0
    out = sum_j exp(s_j - s0) v_j / (1 + sum_j exp(s_j - s0))

That is the attention with the zero token, exactly. It takes no token in the text, no shifted position, no kernel of our
own and no look into vLLM's pages. `docs/serving.md` says what it costs and what else was considered.

Shapes: t tokens, h query heads, k key-value heads, d head size, p the kernel's head size. Queries, keys and values come
flat, `(t, h * d)`, as vLLM has them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerodraft.common.errors import ZerodraftError

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's attention kernel for CPUs."""


def kernel_size(head_dim: int) -> int:
    """The smallest head size of a kernel with room for one more dimension.

    Raises:
        ZerodraftError: there is none.
    """
    size = next((size for size in HEAD_SIZES if size > head_dim), None)
    if size is None:
        raise ZerodraftError(
            f"head_dim={head_dim} must be below {HEAD_SIZES[-1]}, as the zero token takes one more dimension of vLLM's "
            "attention; run this model with 'zerodraft serve'."
        )
    return size


def padded(x: Tensor, column: Tensor | float) -> Tensor:
    """`(t, h, d)` to `(t, h * p)`: `column` is the first of the new dimensions, the others are zero."""
    wide = F.pad(x, (0, kernel_size(x.shape[-1]) - x.shape[-1]))
    wide[..., x.shape[-1]] = column
    return wide.flatten(-2)


class ZeroRotary(nn.Module):
    """In the place of a family's rotary module: rotates, and puts the zero token's scores into the queries.

    Args:
        rotary: The family's own.
        key: `(k, d)`, the zero key; None for an attention without, which then is the ordinary one.
        head_dim: d.
        relation: `ZttConfig.zero_rope`.
    """

    def __init__(self, rotary: Any, key: Tensor | None, head_dim: int, relation: str) -> None:
        super().__init__()
        self.rotary, self.key, self.head_dim, self.relation = rotary, key, head_dim, relation

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys with one more dimension, `(t, h * p)` and `(t, k * p)`."""
        unrotated = q.clone() if self.key is not None and self.relation != "origin" else q
        q, k = self.rotary(positions, q, k)
        scores = 0.0 if self.key is None else -self.scores(positions, unrotated, q, self.key)
        q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k))
        return padded(q, scores), padded(k, 1.0)

    def scores(self, positions: Tensor, unrotated: Tensor, q: Tensor, key: Tensor) -> Tensor:
        """Scores of the zero token, `(t, h)`, before they are scaled."""
        kv_heads = len(key)
        if self.relation != "origin":
            # A score depends on the distance alone, which is 0 with "none" and 1 with "relative" at every position.
            start = torch.zeros_like(positions)
            distance = start + int(self.relation == "relative")
            keys = key.flatten().repeat(len(q), 1)
            q, _ = self.rotary(distance, unrotated, keys.clone())
            _, key = self.rotary(start, unrotated.clone(), keys)
        key = key.reshape(-1, kv_heads, 1, self.head_dim)
        return (q.view(len(q), kv_heads, -1, self.head_dim) * key).sum(-1).flatten(1)


class ZeroAttention(nn.Module):
    """In the place of a family's attention kernel, behind a `ZeroRotary`."""

    def __init__(self, attention: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.attention, self.head_dim = attention, head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From `(t, h * p)`, `(t, k * p)` and `(t, k * d)` to `(t, h * d)`."""
        out = self.attention(q, k, padded(v.unflatten(-1, (-1, self.head_dim)), 0.0))
        return out.unflatten(-1, (-1, kernel_size(self.head_dim)))[..., : self.head_dim].flatten(-2)
