"""All layers of a lean pass in one call of the compiled kernels: no Python and no allocation between the products.

What the call does is what `LeanTarget` does with torch's operators, in the same layout of heads and cache; the tests
hold the two together.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from zerodraft.targets.compiled import PANEL, Kernels, LayerPointers, Pass, Shape, kernels, pointer
from zerodraft.targets.packed import PackedLinear

if TYPE_CHECKING:
    from zerodraft.targets.lean_weights import LeanLayer, LeanWeights

PRODUCTS = ("qkv", "out", "gate", "up", "down")


class CompiledLayers:
    """The layers of `LeanWeights`, as the kernels take them."""

    def __init__(self, functions: Kernels, weights: "LeanWeights") -> None:
        self._functions, self._weights = functions, weights
        first = weights.layers[0]
        self._shape = Shape(
            layers=len(weights.layers),
            hidden=first.qkv.in_features,
            inner=first.gate.out_features,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            floor=float(weights.floor),
            head_floor=float(weights.head_floor),
            scale=weights.score_scale,
        )
        self._layers = (LayerPointers * len(weights.layers))(*map(_pointers, weights.layers))

    @staticmethod
    def of(weights: "LeanWeights") -> "CompiledLayers | None":
        """None where there are no kernels, or for layers that they do not compute."""
        functions = kernels()
        fits = (
            functions is not None
            and weights.head_dim % PANEL == 0
            and all(layer.zero is None for layer in weights.layers)
            and all(getattr(layer, name).panels is not None for layer in weights.layers for name in PRODUCTS)
        )
        return CompiledLayers(functions, weights) if functions is not None and fits else None

    def __call__(
        self,
        x: Float[Tensor, "N H"],
        turns: Tensor,
        kv: Tensor,
        past: int,
        biases: Mapping[int | None, Tensor | None],
        taps: Sequence[int],
        *,
        causal: bool,
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
        """
        layers = self._weights.layers
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
            x=x.data_ptr(),
            turns=turns.data_ptr(),
            kv=kv.data_ptr(),
        )
        masks = [pointer(biases[layer.window]) for layer in layers]
        self._functions.forward(
            self._shape, self._layers, run, masks, [pointer(tapped.get(i)) for i in range(len(layers))]
        )
        return tapped


def _pointers(layer: "LeanLayer") -> LayerPointers:
    pointers: dict[str, int | None] = {"qk_gain": pointer(layer.qk_gain)}
    for name in PRODUCTS:
        product: PackedLinear = getattr(layer, name)
        pointers |= {name: pointer(product.panels), f"{name}_bias": pointer(product.bias)}
    return LayerPointers(**pointers)
