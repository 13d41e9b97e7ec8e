"""A linear layer whose weight is laid out once for the CPU's matrix kernels.

oneDNN multiplies fastest when the weight is in its own blocked order. torch reorders it on every call; here it is done
once, through the two operators that torch's compiler uses when it freezes a model. Reading the weights is nearly all
that decoding a few tokens costs, so 8 rows then take little longer than one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# With a hint of one row oneDNN keeps the plain order, which is slow for all other row counts; from 4 rows on it always
# chooses the same blocked order.
_ROWS = 8


class PackedLinear:
    """`x @ weight.T + bias` for inference, with what follows it (an activation, a sum, a product) in the same kernel.

    Holds its own copy of the weight: later changes to the argument go unnoticed. Where oneDNN or its operators are
    missing, or for a device or dtype other than float32 on the CPU, it computes the same with `F.linear`. Inputs may
    have any number of leading dimensions and must be contiguous.
    """

    __slots__ = ("_bias", "_packed", "_plain", "in_features", "out_features")

    @torch.no_grad()
    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = None if bias is None else bias.detach().clone()
        self._packed = _pack(weight.detach())
        self._plain = weight.detach().clone() if self._packed is None else weight.new_empty(0)

    @staticmethod
    def of(linear: nn.Linear) -> "PackedLinear":
        """Pack a layer's weight and bias."""
        return PackedLinear(linear.weight, linear.bias)

    @property
    def packed(self) -> bool:
        """Whether oneDNN's kernels are used."""
        return self._packed is not None

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        if self._packed is None:
            return F.linear(x, self._plain, self._bias)
        return _linear(x, self._packed, self._bias, "none", _NO_SCALARS, "")

    def silu(self, x: Tensor) -> Tensor:
        """silu(product)."""
        if self._packed is None:
            return F.silu(F.linear(x, self._plain, self._bias))
        return _linear(x, self._packed, self._bias, "swish", _NO_SCALARS, "")

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """product + other."""
        if self._packed is None:
            return F.linear(x, self._plain, self._bias).add_(other)
        return _linear_binary(x, other, self._packed, self._bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """product * other."""
        if self._packed is None:
            return F.linear(x, self._plain, self._bias).mul_(other)
        return _linear_binary(x, other, self._packed, self._bias, "mul")


_NO_SCALARS: list[float | None] = []

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_linear_binary: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "binary", None)


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's order, or None where that cannot be used."""
    operators = (_reorder, _linear, _linear_binary)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or None in operators:
        return None
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    return _reorder(weight.contiguous(), _ROWS)
