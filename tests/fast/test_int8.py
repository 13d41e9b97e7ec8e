"""Int8 layers: close to the exact ones, everywhere that a packed one can stand."""

import pytest
import torch
from torch import nn

from zerodraft.fast.int8 import Int8Linear, int8_available

pytestmark = pytest.mark.skipif(not int8_available(torch.device("cpu")), reason="this torch has no int8 kernels")


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_close(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0  # a row without a scale of its own
        linear.weight[5] *= 50  # and one that would spoil a common scale
    x, other = torch.randn(7, 96), torch.randn(7, 40)
    with torch.inference_mode():
        exact, fast = linear(x), Int8Linear.of(linear)
        spread = exact.std(0)
        assert ((fast(x) - exact).abs() <= 0.1 * spread + 0.02).all()
        assert torch.equal(fast.add(x, other), fast(x) + other)
        assert torch.equal(fast.times(x, other), fast(x) * other)
        assert not torch.equal(fast(x), exact)  # rounding there is, or the test would prove nothing


def test_other_devices_have_none() -> None:
    assert not int8_available(torch.device("meta"))
