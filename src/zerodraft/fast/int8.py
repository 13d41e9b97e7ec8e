"""A linear layer with int8 weights, for networks that may be a little wrong: drafters.

Weights are rounded channel by channel, inputs on the fly (FBGEMM's dynamic quantisation). Memory traffic is a quarter
of float32's, and with few rows that is what a pass costs. A target is never run this way: its output would change.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zerodraft.fast.compiled import kernels
from zerodraft.fast.packed import NarrowLinear

_prepack: Any = getattr(torch.ops.quantized, "linear_prepack", None)
_linear: Any = getattr(torch.ops.quantized, "linear_dynamic", None)


def int8_available(device: torch.device) -> bool:
    """Whether this torch has int8 kernels for a device."""
    engines = set(torch.backends.quantized.supported_engines)
    return device.type == "cpu" and None not in (_prepack, _linear) and bool(engines & {"fbgemm", "x86"})


def rounded_linear(device: torch.device) -> "type[NarrowLinear] | type[Int8Linear] | None":
    """The fastest product with rounded weights on a device, if there is one: bfloat16 by our kernels, or int8."""
    if device.type == "cpu" and kernels() is not None:
        return NarrowLinear
    return Int8Linear if int8_available(device) else None


class Int8Linear:
    """`x @ weight.T + bias`, nearly, with the interface of `PackedLinear`."""

    __slots__ = ("_packed",)

    @torch.no_grad()
    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> None:
        weight = weight.detach().float()
        # a row of zeros has no scale of its own
        scales = weight.abs().amax(1).clamp_min(1e-8).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        with warnings.catch_warnings():
            # the way to make such tensors is deprecated, but their kernels have no other
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._packed = _prepack(rounded, None if bias is None else bias.detach().float())

    @staticmethod
    def of(linear: nn.Linear) -> "Int8Linear":
        """Round and pack a layer's weight."""
        return Int8Linear(linear.weight, linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        # without VNNI, products of full-range inputs would overflow 16 bits
        return _linear(x, self._packed, True)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """product + other."""
        return self(x).add_(other)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """product * other."""
        return self(x).mul_(other)
