"""A linear layer whose weight is laid out once for the CPU's matrix kernels.

Reading the weights is nearly all that decoding a few tokens costs, so 8 rows ought to take little longer than one. Our
own kernels (`compiled`) come close to that. Without them, oneDNN multiplies fastest when the weight is in
its own blocked order: torch reorders it on every call; here it is done once, through the two operators that torch's
compiler uses when it freezes a model.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zerodraft.fast.compiled import After, kernels, to_panels

# With a hint of one row oneDNN keeps the plain order, which is slow for all other row counts; from 4 rows on it always
# chooses the same blocked order.
_ROWS = 8


class PackedLinear:
    """`(x * gain) @ weight.T + bias` for inference, with what follows it (an activation, a sum, a product) in the same
    kernel.

    Holds its own copy of the weight: later changes to the argument go unnoticed. Where neither our kernels nor oneDNN's
    operators are to be had, or for a device or dtype other than float32 on the CPU, it computes the same with
    `F.linear`. Inputs may have any number of leading dimensions and must be contiguous.

    **Fields:** `bias`; `panels`, the weight as our kernels have it, None without them; `gain`, if it is not in there.
    """

    __slots__ = ("_kernels", "_packed", "_plain", "bias", "gain", "in_features", "out_features", "panels")
    panel_dtype: ClassVar[torch.dtype] = torch.float32
    takes_gain_in: ClassVar[bool] = True

    @torch.no_grad()
    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, "out"] | None = None,
        gain: Float[Tensor, "in"] | None = None,
    ) -> None:
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().clone()
        self._kernels = kernels() if _is_float32_on_cpu(weight) else None
        self.gain = None
        if self._kernels is not None and not self.takes_gain_in:
            self.gain, gain = gain, None
        self.panels = to_panels(weight, gain).to(self.panel_dtype) if self._kernels else None
        if self._kernels is None and gain is not None:
            weight = weight * gain
        self._packed = _pack(weight) if self._kernels is None else None
        self._plain = weight.clone() if not self.packed else weight.new_empty(0)

    @classmethod
    def of(cls, linear: nn.Linear, gain: Float[Tensor, "in"] | None = None) -> "PackedLinear":
        """Pack a layer's weight and bias."""
        return cls(linear.weight, linear.bias, gain)

    @property
    def packed(self) -> bool:
        """Whether the weight is laid out for our kernels or oneDNN's."""
        return self.panels is not None or self._packed is not None

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return self._product(x, "")

    def silu(self, x: Tensor) -> Tensor:
        """silu(product)."""
        return self._product(x, "silu")

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """product + other."""
        return self._product(x, "add", other)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """product * other."""
        return self._product(x, "times", other)

    def _product(self, x: Tensor, after: After, other: Tensor | None = None) -> Tensor:
        if self._kernels is not None and self.panels is not None:
            x = x if self.gain is None else x * self.gain
            return self._kernels.linear(x, self.panels, self.bias, self.out_features, after, other)
        if self._packed is not None:
            if other is None:
                return _linear(x, self._packed, self.bias, _ONEDNN[after], _NO_SCALARS, "")
            return _linear_binary(x, other, self._packed, self.bias, _ONEDNN[after])
        product = F.linear(x, self._plain, self.bias)
        if other is None:
            return F.silu(product) if after == "silu" else product
        return product.add_(other) if after == "add" else product.mul_(other)


class NarrowLinear(PackedLinear):
    """The same with weights rounded to bfloat16 where our kernels multiply: half the memory traffic, for networks that
    may be a little wrong. A target is never run this way: its output would change."""

    __slots__ = ()
    panel_dtype = torch.bfloat16


class HalvesLinear(PackedLinear):
    """The same for weights that are exactly bfloat16 (`is_bfloat16`), as those of most published models are: nothing is
    lost, and half the memory is read. A gain stays outside of them."""

    __slots__ = ()
    panel_dtype = torch.bfloat16
    takes_gain_in = False


def is_bfloat16(weight: Tensor) -> bool:
    """Whether a float32 tensor holds nothing but bfloat16 numbers."""
    bits = weight.detach().flatten().view(torch.int32)
    # most that do not are known by their first numbers
    return not any(bool((part & 0xFFFF).any()) for part in (bits[:1024], bits))


_ONEDNN: dict[After, str] = {"": "none", "silu": "swish", "add": "add", "times": "mul"}
_NO_SCALARS: list[float | None] = []

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_linear_binary: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "binary", None)


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's order, or None where that cannot be used."""
    if not _is_float32_on_cpu(weight) or None in (_reorder, _linear, _linear_binary):
        return None
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    return _reorder(weight.contiguous(), _ROWS)


def _is_float32_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
