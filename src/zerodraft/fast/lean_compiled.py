"""All layers of a lean pass in one call of the compiled kernels: no Python and no allocation between the products.

What the call does is what `LeanTarget` does with torch's operators, in the same layout of heads and cache; the tests
hold the two together.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.compiled import PANEL, Kernels, LayerPointers, Pass, Shape, address, kernels
from zerodraft.fast.packed import PackedLinear

if TYPE_CHECKING:
    from zerodraft.fast.lean_weights import LeanLayer

PRODUCTS = ("qkv", "out", "gate", "up", "down")


class CompiledLayers:
    """Packed layers as the kernels take them."""

    def __init__(self, functions: Kernels, layers: Sequence["LeanLayer"], shape: Shape) -> None:
        self._functions, self._layers, self._shape = functions, layers, shape
        self._pointers = (LayerPointers * len(layers))(*(_pointers(layer, shape) for layer in layers))

    @staticmethod
    def of(
        layers: Sequence["LeanLayer"],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
        head_layers: int = 0,
    ) -> "CompiledLayers | None":
        """None where there are no kernels, or for layers that they do not compute: FFNs that a zero token's mass gates.

        Args:
            layers: in the order in which they run.
            heads: of queries.
            kv_heads: of keys, and of values.
            head_dim: size of a head.
            eps: of the norms.
            scale: multiplies the attention scores.
            head_layers: those whose output a Zero Token Transformer feeds in again.
        """
        functions = kernels()
        zeros = [layer.zero for layer in layers if layer.zero is not None]
        if functions is None or head_dim % PANEL or any(zero.gates_ffn and zero.key is not None for zero in zeros):
            return None
        first = layers[0]
        hidden, inner, attended = first.qkv.in_features, first.gate.out_features, heads * head_dim
        sizes = {
            "qkv": (hidden, attended + 2 * kv_heads * head_dim),
            "out": (attended, hidden),
            "gate": (hidden, inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }
        products = [(sizes[name], getattr(layer, name)) for layer in layers for name in PRODUCTS]
        if any(
            product.panels is None or size != (product.in_features, product.out_features) for size, product in products
        ):
            return None
        shape = Shape(
            layers=len(layers),
            hidden=hidden,
            inner=inner,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            narrow=first.qkv.panel_dtype == torch.bfloat16,
            head_layers=head_layers if any(zero.injection for zero in zeros) else -1,
            gated=any(zero.gate is not None for zero in zeros),
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
        layers, shape = self._layers, self._shape
        batch, capacity = kv.shape[1], kv.shape[3]
        tokens, new = len(x) // batch, 0 if context is None else len(context)
        if past + tokens > capacity or len(x) % batch or new > tokens:
            raise ZerodraftError(
                f"A pass of {len(x)} rows over {batch} texts does not fit behind {past} of {capacity} slots."
            )
        tapped = {tap: torch.empty_like(x) for tap in taps if tap < len(layers)}
        tapped_at = [tapped[i].data_ptr() if i in tapped else None for i in range(len(layers))]
        # the mask of one text without a window says nothing about what is cached
        whole = batch > 1 or any(window is not None and bias is not None for window, bias in biases.items())
        run = Pass(
            sequences=batch,
            tokens=tokens,
            past=past,
            capacity=capacity,
            causal=causal,
            masked_from=0 if whole else past,
            context=new,
            feed_step=len(layers) * shape.hidden,
            last_from=len(x) - 1 if last_only else new,
            x=address(x, (len(x), shape.hidden)),
            turns=address(turns, (len(x), shape.head_dim // 2), torch.complex64),
            kv=address(kv, (len(layers), batch, 2 * shape.kv_heads, capacity, shape.head_dim)),
        )
        seen = (batch, 1, tokens, past + tokens)
        at = {window: None if bias is None else address(bias, seen) for window, bias in biases.items()}
        masks = [at[layer.window] for layer in layers]
        feeds: list[int | None] = [None] * len(layers)
        if context is not None:
            first, step = address(context, (new, len(layers), shape.hidden)), shape.hidden * context.element_size()
            feeds = [first + i * step for i in range(len(layers))]
        self._functions.forward(shape, self._pointers, run, masks, tapped_at, feeds)
        return tapped


def _pointers(layer: "LeanLayer", shape: Shape) -> LayerPointers:
    gains = {"before": layer.qkv.gain, "after": layer.gate.gain}
    pointers = {name: None if gain is None else address(gain, (shape.hidden,)) for name, gain in gains.items()}
    if layer.qk_gain is not None:
        pointers["qk_gain"] = address(layer.qk_gain, (shape.heads + shape.kv_heads, shape.head_dim))
    run: dict[str, Any] = {"cycle_gate": 1.0, "scale": 1.0}
    if (zero := layer.zero) is not None:
        given = {"cycle_gate": zero.gate, "injection": zero.injection, "scale": zero.scale}
        run |= {name: value for name, value in given.items() if value is not None}
        if zero.key is not None:
            run |= {"zero": address(zero.key, (shape.kv_heads, shape.head_dim)), "zero_turns": zero.turned}
    dtype = torch.bfloat16 if shape.narrow else torch.float32
    for name in PRODUCTS:
        product: PackedLinear = getattr(layer, name)
        panels, bias, outputs = product.panels, product.bias, product.out_features
        assert panels is not None
        pointers[name] = address(panels, (-(-outputs // PANEL), product.in_features, PANEL), dtype)
        pointers[f"{name}_bias"] = None if bias is None else address(bias, (outputs,))
    return LayerPointers(**pointers, **run)
