"""The layers of a block drafter while decoding: over new states of the target and a block of slots, with a cache.

New states and the block go through each layer together, as a few more rows cost next to nothing; the states do no more
there than leave their keys and values. The block's own lie behind the context and are overwritten next time. The block
sees everything that is there, so attention needs no mask but on a GPU, where it runs over the whole cache (`reach`).

Legend: M new context positions, K slots, F tapped states (one a layer), H hidden size, nk key/value heads, D head size,
S positions of the cache, R = M + K rows.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.drafters.block_model import BlockDrafterModel, BlockLayer
from zerodraft.drafters.tapped import PackedLayer, reach
from zerodraft.fast.compiled import CPU, kernels
from zerodraft.fast.int8 import Int8Linear
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.layer import pack_layer
from zerodraft.fast.lean.passes import Tokens
from zerodraft.fast.lean.weights import rotations
from zerodraft.fast.modules import VARYING_ROPE
from zerodraft.fast.packed import PackedLinear


@runtime_checkable
class BlockLayers(Protocol):
    """Runs the layers."""

    def __call__(
        self, taps: Float[Tensor, "M F H"], x: Float[Tensor, "K H"], cache: Float[Tensor, "F 2 nk S D"], start: int
    ) -> Float[Tensor, "K H"]:
        """The slots' states behind the last layer; keys and values are written to the cache from `start` on."""
        ...


def block_layers(model: BlockDrafterModel, linear: type[PackedLinear] | type[Int8Linear]) -> BlockLayers:
    """All layers in one call of our kernels where they can compute them, else one after another with torch."""
    compiled = _compiled(model, linear) if issubclass(linear, PackedLinear) else None
    return EachLayer(model, linear) if compiled is None else compiled


class EachLayer:
    """One layer after another, on any device."""

    def __init__(self, model: BlockDrafterModel, linear: type[PackedLinear] | type[Int8Linear]) -> None:
        self.layers = [PackedLayer(layer, linear) for layer in model.layers if isinstance(layer, BlockLayer)]
        self.rotate = model.rotate

    def __call__(
        self, taps: Float[Tensor, "M F H"], x: Float[Tensor, "K H"], cache: Float[Tensor, "F 2 nk S D"], start: int
    ) -> Float[Tensor, "K H"]:
        """See `BlockLayers`."""
        end = start + len(taps) + len(x)
        keys = reach(x.device, end, cache.shape[-2])
        mask = None if keys == end else hidden_from(end, keys, x)
        return self.run(taps, x, cache[..., :keys, :], torch.arange(start, end, device=x.device), mask)

    def run(
        self,
        taps: Float[Tensor, "M F H"],
        x: Float[Tensor, "K H"],
        cache: Float[Tensor, "F 2 nk S D"],
        columns: Int[Tensor, " R"],
        mask: Float[Tensor, "1 K S"] | None,
    ) -> Float[Tensor, "K H"]:
        """The same with the places of all rows, which are those where keys and values are written, in a tensor, over
        the whole cache, with what is added to its scores."""
        rotary = self.rotate(columns[None])
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat([taps[:, i], x]), len(x), rotary, cache[i], columns, mask)
        return x


def hidden_from(end: int | Int[Tensor, "1"], keys: int, x: Float[Tensor, "K H"]) -> Float[Tensor, "1 K S"]:
    """What is added to the scores of a cache of `keys` positions so that from `end` on none is seen."""
    hidden = torch.arange(keys, device=x.device) >= end
    return x.new_zeros(1, len(x), keys).masked_fill_(hidden, torch.finfo(x.dtype).min)


class CompiledBlock:
    """All layers in one call; positions turn pairs of neighbouring elements, as in the lean decode path."""

    def __init__(self, layers: CompiledLayers, rotary: Any) -> None:
        self.layers = layers
        self.frequencies: Tensor = rotary.inv_freq.float()
        self.scale = float(rotary.attention_scaling)

    def __call__(
        self, taps: Float[Tensor, "M F H"], x: Float[Tensor, "K H"], cache: Float[Tensor, "F 2 nk S D"], start: int
    ) -> Float[Tensor, "K H"]:
        """See `BlockLayers`."""
        rows = torch.cat([taps[:, -1], x])
        turns = rotations(torch.arange(start, start + len(rows), device=CPU), self.frequencies, self.scale)
        kv = cache.flatten(1, 2)[:, None]
        tokens = Tokens(turns=turns, biases={None: None}, past=start, seen=start + len(rows))
        self.layers.run_fed(rows, kv, tokens, taps)
        return rows[len(taps) :]


def _compiled(model: BlockDrafterModel, linear: type[PackedLinear]) -> CompiledBlock | None:
    layers = [layer for layer in model.layers if isinstance(layer, BlockLayer)]
    rotary: Any = model.rotary
    silu = all("SiLU" in type(layer.mlp.activation).__name__ for layer in layers)
    if kernels() is None or not silu or rotary.rope_type in VARYING_ROPE:
        return None
    first = layers[0].self_attn
    compiled = CompiledLayers.of(
        [pack_layer(layer, first.head_dim, None, linear) for layer in layers],
        heads=first.num_heads,
        kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        eps=model.config.target().rms_norm_eps,
        scale=first.head_dim**-0.5,
    )
    return None if compiled is None else CompiledBlock(compiled, rotary)
