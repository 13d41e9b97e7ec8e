"""All layers of a lean pass in one call of the compiled kernels: no Python and no allocation between the products.

What the call does is what `LeanTarget` does with torch's operators, in the same layout of heads and cache; the tests
hold the two together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from zerodraft.targets.compiled import PANEL, Kernels, LayerPointers, Pass, Shape, kernels, pointer
from zerodraft.targets.packed import PackedLinear

if TYPE_CHECKING:
    from zerodraft.targets.lean_weights import LeanLayer

PRODUCTS = ("qkv", "out", "gate", "up", "down")


class CompiledLayers:
    """Packed layers as the kernels take them."""

    def __init__(self, functions: Kernels, layers: Sequence["LeanLayer"], shape: Shape) -> None:
        self._functions, self._layers, self._shape = functions, layers, shape
        self._pointers = (LayerPointers * len(layers))(*map(_pointers, layers))

    @staticmethod
    def of(
        layers: Sequence["LeanLayer"], *, heads: int, kv_heads: int, head_dim: int, eps: float, scale: float
    ) -> "CompiledLayers | None":
        """None where there are no kernels, or for layers that they do not compute.

        Args:
            layers: in the order in which they run.
            heads: of queries.
            kv_heads: of keys, and of values.
            head_dim: size of a head.
            eps: of the norms.
            scale: multiplies the attention scores.
        """
        functions = kernels()
        if (
            functions is None
            or head_dim % PANEL
            or any(layer.zero is not None for layer in layers)
            or any(getattr(layer, name).panels is None for layer in layers for name in PRODUCTS)
        ):
            return None
        first = layers[0]
        shape = Shape(
            layers=len(layers),
            hidden=first.qkv.in_features,
            inner=first.gate.out_features,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            narrow=first.qkv.panel_dtype == torch.bfloat16,
            floor=math.sqrt(first.qkv.in_features * eps),
            head_floor=math.sqrt(head_dim * eps),
            scale=scale,
        )
        return CompiledLayers(functions, layers, shape)

    def __call__(
        self,
        x: Float[Tensor, "N H"],
        turns: Tensor,
        kv: Tensor,
        past: int,
        biases: Mapping[int | None, Tensor | None],
        taps: Sequence[int] = (),
        *,
        causal: bool = False,
        context: Float[Tensor, "M L H"] | None = None,
        last_only: bool = False,
    ) -> dict[int, Tensor]:
        """Changes x into the residual stream behind the last layer and writes to the cache; returns the tapped states.

        Args:
            x: the embeddings.
            turns: complex, what turns a pair of each position's queries and keys (N, D/2).
            kv: the cache, (layers, B, keys' and values' heads, slots, D).
            past: slots in use.
            biases: what is added to the scores (B, 1, T, S), by the layers' window.
            taps: layers in front of which the stream is wanted.
            causal: without a bias, each token sees what is before it rather than everything.
            context: what the first M tokens of the only sequence are in front of each layer, where they do no more than
                leave keys and values; of x the rest is meant then.
            last_only: of x only the last row is wanted; for a single sequence.
        """
        layers = self._layers
        batch = kv.shape[1]
        tapped = {tap: torch.empty_like(x) for tap in taps if tap < len(layers)}
        # the mask of one text without a window says nothing about what is cached
        whole = batch > 1 or any(window is not None and bias is not None for window, bias in biases.items())
        run = Pass(
            sequences=batch,
            tokens=len(x) // batch,
            past=past,
            capacity=kv.shape[3],
            causal=causal,
            masked_from=0 if whole else past,
            context=0 if context is None else len(context),
            feed_step=0 if context is None else context.stride(0),
            last_from=len(x) - 1 if last_only else 0 if context is None else len(context),
            x=x.data_ptr(),
            turns=turns.data_ptr(),
            kv=kv.data_ptr(),
        )
        masks = [pointer(biases[layer.window]) for layer in layers]
        feeds = [None if context is None else pointer(context[:, i]) for i in range(len(layers))]
        tapped_at = [pointer(tapped.get(i)) for i in range(len(layers))]
        self._functions.forward(self._shape, self._pointers, run, masks, tapped_at, feeds)
        return tapped


def _pointers(layer: "LeanLayer") -> LayerPointers:
    pointers = {"qk_gain": pointer(layer.qk_gain), "before": pointer(layer.qkv.gain), "after": pointer(layer.gate.gain)}
    for name in PRODUCTS:
        product: PackedLinear = getattr(layer, name)
        pointers |= {name: pointer(product.panels), f"{name}_bias": pointer(product.bias)}
    return LayerPointers(**pointers)
