"""A packed linear layer is the linear layer, with our kernels, with oneDNN and with neither."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zerodraft.fast.compiled import kernels
from zerodraft.fast.packed import HalvesLinear, NarrowLinear, PackedLinear, is_bfloat16


@pytest.mark.parametrize("by", ["compiled", "onednn", "torch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (17,), (2, 5)])
@torch.no_grad()
def test_equals_the_layer(by: str, bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "compiled" and kernels() is None:
        pytest.skip("needs a C++ compiler and torch's OpenMP")
    if by != "compiled":
        monkeypatch.setattr("zerodraft.fast.packed.kernels", lambda: None)
    if by == "torch":
        monkeypatch.setattr("zerodraft.fast.packed._linear", None)
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    packed = PackedLinear.of(layer)
    assert (packed.panels is not None) == (by == "compiled")
    assert packed.packed == (by == "compiled" or (by == "onednn" and torch.backends.mkldnn.is_available()))
    assert (packed.in_features, packed.out_features) == (24, 40)
    x, other = torch.randn(*shape, 24), torch.randn(*shape, 40)
    kept, expected = other.clone(), layer(x)
    for found, wanted in (
        (packed(x), expected),
        (packed.silu(x), F.silu(expected)),
        (packed.add(x, other), expected + other),
        (packed.times(x, other), expected * other),
    ):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    assert torch.equal(other, kept)


@torch.no_grad()
def test_weights_that_are_bfloat16_stay_exact() -> None:
    """Also with a gain, by which their product would not be; rounding other weights shows."""
    torch.manual_seed(0)
    layer, gain, x = nn.Linear(24, 40), torch.rand(24) + 0.5, torch.randn(3, 24)
    assert not is_bfloat16(layer.weight)
    wanted = F.linear(x * gain, layer.weight, layer.bias)
    assert not torch.allclose(NarrowLinear.of(layer, gain)(x), wanted, atol=1e-5) or kernels() is None
    layer.weight.copy_(layer.weight.bfloat16())
    assert is_bfloat16(layer.weight)
    wanted = F.linear(x * gain, layer.weight, layer.bias)
    torch.testing.assert_close(HalvesLinear.of(layer, gain)(x), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 1023, 1024, 5000])
def test_one_number_that_is_not_bfloat16_is_noticed(place: int) -> None:
    weight = torch.randn(50, 101).bfloat16().float()
    assert is_bfloat16(weight)
    weight.view(-1)[place] = 1 + 2**-20
    assert not is_bfloat16(weight)


def test_a_copy_is_held() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    packed, expected = PackedLinear.of(layer), layer(x).detach()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    torch.testing.assert_close(packed(x), expected)
    assert not packed(x).requires_grad


def test_other_dtypes_are_computed_plainly() -> None:
    layer = nn.Linear(8, 8).double()
    packed, x = PackedLinear.of(layer), torch.randn(2, 8, dtype=torch.float64)
    assert not packed.packed
    torch.testing.assert_close(packed(x), layer(x).detach())
