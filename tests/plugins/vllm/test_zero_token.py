"""The zero token as a sink: what goes into vLLM's kernel, before a kernel of three lines."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zerodraft import ZerodraftError
from zerodraft.plugins.vllm.attention import ZeroAttention, ZeroRotary, kernel_size
from zerodraft.ztt.attention import zero_attention_reference, zero_scores

D, H, K, T = 12, 4, 2, 7


class Rotary(nn.Module):
    """Rotations as vLLM's modules do them: flat heads, angles for positions from 0 on, and in place."""

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert bool((positions >= 0).all())
        return q.copy_(rotated(q, positions)), k.copy_(rotated(k, positions))


class Kernel(nn.Module):
    """Causal attention over flat heads with a sink of score 0 in each, or with none."""

    def __init__(self, sink: bool) -> None:
        super().__init__()
        self.sink = sink

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, kernel_size(D))).transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(H // K, 0) for x in (k, v))
        scores = (q @ k.mT * D**-0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        if self.sink:
            scores = torch.cat([scores, scores.new_zeros(H, T, 1)], -1)
        return (scores.softmax(-1)[..., :T] @ v).transpose(0, 1).flatten(1)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Flat heads `(t, h * d)` turned by their positions."""
    angles = (positions[:, None] * 10.0 ** -torch.arange(D // 2, dtype=x.dtype)).repeat(1, 2)[:, None]
    heads = x.unflatten(-1, (-1, D))
    first, second = heads.chunk(2, -1)
    return (heads * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).flatten(1)


def drawn(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, size * D, dtype=torch.float64, generator=generator) for size in sizes]


@pytest.mark.parametrize("relation", ["origin", "none", "relative"])
def test_equals_attention_with_a_zero_token(relation: str) -> None:
    q, k, v, drawn_key = drawn(H, K, K, K)
    key, positions = drawn_key[0].view(K, D), torch.arange(3, T + 3)

    def by_head(x: Tensor) -> Tensor:
        return x.view(1, T, -1, D).transpose(1, 2)

    zero_key: Any = key
    if relation != "origin":  # as it is defined: turned along with each query, or one position before it
        zero_key = by_head(rotated(key.flatten().repeat(T, 1), positions - int(relation == "relative")))
    turned = by_head(rotated(q, positions))
    expected, mass = zero_attention_reference(
        turned,
        by_head(rotated(k, positions)),
        by_head(v),
        zero_scores(turned, zero_key, D**-0.5),
        mask=None,
        is_causal=True,
        scale=D**-0.5,
    )
    assert mass.min() < 0.1
    assert mass.max() > 0.5
    out = ZeroAttention(Kernel(sink=True), D)(*ZeroRotary(Rotary(), key, D, relation)(positions, q, k), v)
    # the reference computes its softmax in float32
    torch.testing.assert_close(out, expected[0].transpose(0, 1).flatten(1), atol=1e-6, rtol=0)


def test_without_a_key_it_is_ordinary_attention() -> None:
    q, k, v = drawn(H, K, K)
    positions = torch.arange(T)
    heads = (x.view(T, -1, D).transpose(0, 1) for x in (rotated(q, positions), rotated(k, positions), v))
    expected = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    out = ZeroAttention(Kernel(sink=False), D)(*ZeroRotary(Rotary(), None, D, "none")(positions, q, k), v)
    torch.testing.assert_close(out, expected.transpose(0, 1).flatten(1), atol=1e-12, rtol=0)


def test_sizes_of_kernels() -> None:
    assert [kernel_size(size) for size in (8, 31, 32, 64, 128, 511)] == [32, 32, 64, 80, 160, 512]
    with pytest.raises(ZerodraftError, match="head_dim=512 must be below 512"):
        kernel_size(512)
