"""One packed layer of the lean decode path.

Three things are folded into the packed weights, all exact up to rounding: the gains of the norms before a linear layer
(but where the weights are exactly bfloat16, which they stay), the square root of the norm's width (so that a norm is a
division by a hypotenuse), and an order of each query and key head's elements in which a rotary pair is a complex
number.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zerodraft.fast.lean.ztt import LeanZero
from zerodraft.fast.packed import PackedLinear


@dataclass(frozen=True, slots=True)
class LeanLayer:
    """The packed weights of one execution of a decoder layer. `qk_gain` (heads, D) belongs to families that normalise
    queries and keys; `window` is how far the attention looks back, None for all the way; `zero` is what a Zero Token
    Transformer adds, None where it adds nothing. Executions of the same layer have the same weights in memory."""

    qkv: PackedLinear
    out: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    qk_gain: Tensor | None
    window: int | None
    zero: LeanZero | None = None


def pack_layer(layer: Any, head_dim: int, window: int | None, linear: type[PackedLinear] = PackedLinear) -> LeanLayer:
    """A decoder layer with the parts and names of Llama's, and perhaps Qwen3's norms of queries and keys."""
    attention, mlp = layer.self_attn, layer.mlp
    before, after = gain_of(layer.input_layernorm), gain_of(layer.post_attention_layernorm)
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    weight = torch.cat((_pairs(q.weight, head_dim), _pairs(k.weight, head_dim), v.weight))
    bias = None
    if q.bias is not None:
        bias = torch.cat((_pairs(q.bias, head_dim), _pairs(k.bias, head_dim), v.bias))
    qk_gain = None
    if hasattr(getattr(attention, "q_norm", None), "weight"):
        q_gain = _pairs(attention.q_norm.weight, head_dim).expand(q.out_features // head_dim, -1)
        k_gain = _pairs(attention.k_norm.weight, head_dim).expand(k.out_features // head_dim, -1)
        qk_gain = torch.cat((q_gain, k_gain)) * math.sqrt(head_dim)
    return LeanLayer(
        qkv=linear(weight, bias, before),
        out=linear.of(attention.o_proj),
        gate=linear.of(mlp.gate_proj, after),
        up=linear.of(mlp.up_proj, after),
        down=linear.of(mlp.down_proj),
        qk_gain=qk_gain,
        window=window,
    )


def gain_of(norm: Any) -> Tensor:
    return norm.weight * math.sqrt(norm.weight.numel())


def _pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Within each head put element i and its rotary partner i + D/2 side by side."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)
