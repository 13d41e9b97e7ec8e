"""The Zero Token Transformer in one file: a Llama whose middle layers run several times, and tokens that leave early.

No caches, no families, no speed. `model.py` computes the same for every family of transformers; tests hold the two
together. Parameters have the names that they have in a Llama of transformers.

Idea: Li et al., "Efficient Transformer Parameter Reuse via Zero-Token Mechanism", Findings of ACL 2026.

Legend: b batch, t tokens, d hidden size, h attention heads, k key-value heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of a model. The layers between head and tail are the shared ones, run `cycles` times."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_layers: int = 1
    tail_layers: int = 1
    cycles: int = 3


def rotated(x: Tensor) -> Tensor:
    """Queries or keys `(b, h, t, size)` turned by their positions."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[2])[:, None] * 10_000.0 ** -(torch.arange(0, size, 2) / size)
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Causal attention in which every query also sees the zero token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim, self.groups = size.hidden // size.heads, size.heads // size.kv_heads
        self.q_proj = nn.Linear(size.hidden, size.hidden, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, zero_key: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output `(b, t, d)` and the attention mass on the zero token `(b, t, h)`."""
        projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        q, k, v = rotated(q), rotated(k).repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = q @ k.transpose(-1, -2)
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        if zero_key is None:
            zero = torch.full_like(scores[..., :1], -torch.inf)
        else:
            # one trainable key for each key-value head; it stands at position 0, so nothing turns it
            zero = q @ zero_key.repeat_interleave(self.groups, 0)[..., None]
        weights = (torch.cat([zero, scores], -1) * self.head_dim**-0.5).softmax(-1)
        # its value is zero, so what lands on it adds nothing: the layer is told to do less
        out = (weights[..., 1:] @ v).transpose(1, 2).flatten(2)
        return self.o_proj(out), weights[..., 0].transpose(1, 2)


class Layer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, eps=1e-6)
        up, down = (size.hidden, size.inner), (size.inner, size.hidden)
        shapes = {"gate_proj": up, "up_proj": up, "down_proj": down}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x: Tensor, zero_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The new states and the zero token's mass."""
        attended, mass = self.self_attn(self.input_layernorm(x), zero_key)
        x = x + attended
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](nn.functional.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)), mass


class ZeroTokenTransformer(nn.Module):
    """Head, cycles of the shared layers, tail."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, shared = size, size.layers - size.head_layers - size.tail_layers
        self.embed_tokens = nn.Embedding(size.vocab, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.lm_head = nn.Linear(size.hidden, size.vocab, bias=False)
        # a key for every cycle: by it the shared weights know which one they are in
        self.zero_keys = nn.Parameter(torch.zeros(size.cycles, shared, size.kv_heads, size.hidden // size.heads))

    def forward(self, ids: Tensor, threshold: float = torch.inf) -> tuple[Tensor, Tensor]:
        """Logits `(b, t, vocab)` and how many cycles each token took `(b, t)`. A token leaves after the first cycle in
        which the zero tokens drew this share of its attention; the others still attend to the state that it left."""
        layers, first, last = list(self.layers), self.size.head_layers, self.size.layers - self.size.tail_layers
        x = self.embed_tokens(ids)
        for layer in layers[:first]:
            x, _ = layer(x)
        depth, running = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
        for keys in self.zero_keys:
            depth, masses = depth + running, []
            for layer, key in zip(layers[first:last], keys, strict=True):
                deeper, mass = layer(x, key)
                x = torch.where(running[..., None], deeper, x)
                masses.append(mass)
            running = running & (torch.stack(masses).mean((0, -1)) < threshold)
        for layer in layers[last:]:
            x, _ = layer(x)
        return self.lm_head(self.norm(x)), depth
