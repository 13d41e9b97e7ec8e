"""What drafters that read the target's hidden states share while decoding: sessions, layers, and a check of the target.

The keys and values of the target's states stay cached. The block's own lie behind the context and are overwritten next
time, so that a layer needs no mask unless it looks through a window.

Legend: R rows of one pass (M new context positions, then K slots), F tapped states, H hidden size, nq query heads, nk
key/value heads, D head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.block_model import BlockLayer
from zerodraft.fast.int8 import Int8Linear
from zerodraft.fast.packed import PackedLinear
from zerodraft.fast.recorded import padded

FIRST_SLOTS = 256
"""Cache positions at first, a power of two; doubled when they are full."""


def readable_weights(target: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The weights of the target's embeddings and LM head.

    Raises:
        ZerodraftError: they are not in memory as floats.
    """
    embedding: Any = target.get_input_embeddings()
    head: Any = target.get_output_embeddings()
    for weight in (embedding.weight, head.weight):
        if weight.is_meta or not weight.is_floating_point():
            state = "offloaded" if weight.is_meta else f"quantised ({weight.dtype})"
            raise ZerodraftError(
                f"The drafter reads the target's embeddings and LM head, but these are {state}: keep both in memory as "
                "floats."
            )
    return embedding.weight, head.weight


class TappedRow(ABC):
    """One row: how much context its caches hold, its newest token, and the states that are not in the caches yet."""

    def __init__(self) -> None:
        self.length = 0
        self.newest = torch.zeros((), dtype=torch.long, device="cpu")
        self.pending: list[Tensor] = []

    def take_pending(self, like: Tensor) -> Float[Tensor, "M F H"]:
        """The states that wait, on the device and in the dtype of `like`; after this none do."""
        taps = torch.cat(self.pending).to(like)
        self.pending = []
        return taps

    def rewind(self, length: int) -> None:
        """Take back the states of all but the first `length` positions."""
        if length < self.length:
            self.length, self.pending = length, []
        elif self.pending:
            self.pending = [torch.cat(self.pending)[: length - self.length]]

    @abstractmethod
    def draft(self, length: int) -> Lattice:
        """The next `length` positions."""


class TappedSession:
    """The rows of one generate call. They are drafted one after another, so none depends on another."""

    def __init__(self, rows: Sequence[TappedRow]) -> None:
        self._rows = rows

    def observe(self, progress: Sequence[Progress]) -> None:
        """Notes the newest token and the target's states of each row."""
        for row, new in zip(self._rows, progress, strict=True):
            if len(new.tokens):
                if new.taps is None:
                    raise ZerodraftError("The drafter needs the target's hidden states, but got none.")
                row.newest = new.tokens[-1]
                row.pending.append(new.taps)

    @torch.inference_mode()
    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """A lattice for each row that wants one."""
        return [
            row.draft(length) if length else Lattice.empty() for row, length in zip(self._rows, lengths, strict=True)
        ]

    def rewind(self, row: int, length: int) -> None:
        """Takes back states of the target; see the protocol."""
        self._rows[row].rewind(length)


def grown(cache: Tensor, needed: int) -> Tensor:
    """A cache (..., positions, D) with room for `needed` positions; one that is made larger has a power of two."""
    positions = cache.shape[-2]
    return cache if needed <= positions else F.pad(cache, (0, 0, 0, padded(needed) - positions))


def reach(device: torch.device, end: int, positions: int) -> int:
    """Over how many of a cache's `positions` attention runs: up to `end`, or on a GPU over all, those behind hidden.

    cuDNN's attention makes a plan for every new number of keys, and on an H200 that took six times as long as the rest
    of a draft.
    """
    return end if device.type == "cpu" else positions


def on_host(*tensors: Tensor) -> list[np.ndarray]:
    """As arrays; from a GPU in a single transfer, as each waits for the device."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.numpy() for tensor in tensors]
    return in_one_piece(*tensors)


def in_one_piece(*tensors: Tensor) -> list[np.ndarray]:
    """`on_host` by way of one tensor of bytes."""
    return unpacked(one_piece(tensors), tensors)


def one_piece(tensors: Sequence[Tensor]) -> UInt8[Tensor, " n"]:
    """The bytes of all of them."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpacked(piece: UInt8[Tensor, " n"], like: Sequence[Tensor]) -> list[np.ndarray]:
    """Arrays of their own from the bytes of tensors with shapes and dtypes like these."""
    ends = np.cumsum([tensor.nbytes for tensor in like])
    arrays = np.split(piece.to("cpu", copy=True).numpy(), ends[:-1])
    dtypes = [torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype for tensor in like]
    return [array.view(dtype).reshape(one.shape) for array, dtype, one in zip(arrays, dtypes, like, strict=True)]


def release(*packed: nn.Module) -> None:
    """Frees the weights of all linear layers in modules whose packed copies take their place.

    Only for a network that nobody else holds: it cannot be called as a whole any more.
    """
    for part in packed:
        for module in part.modules():
            if isinstance(module, nn.Linear):
                module.to("meta")


class PackedLayer:
    """A `BlockLayer` for decoding: packed weights, one product for queries, keys and values, a cache in place."""

    def __init__(self, layer: BlockLayer, linear: type[PackedLinear] | type[Int8Linear] = PackedLinear) -> None:
        self.source = layer
        attention = layer.self_attn
        self.heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = torch.cat([part.bias for part in parts]) if attention.q_proj.bias is not None else None
        self.qkv = linear(torch.cat([part.weight for part in parts]), bias)
        self.out = linear.of(attention.o_proj)
        self.gate, self.up = linear.of(layer.mlp.gate_proj), linear.of(layer.mlp.up_proj)
        self.down = linear.of(layer.mlp.down_proj)

    def __call__(
        self,
        rows: Float[Tensor, "R H"],
        slots: int,
        rotary: tuple[Tensor, Tensor],
        cache: Float[Tensor, "2 nk S D"],
        columns: Int[Tensor, " R"],
        seen: Bool[Tensor, "1 K S"] | Float[Tensor, "1 K S"] | None = None,
    ) -> Float[Tensor, "K H"]:
        """Writes the keys and values of all rows, and computes the last `slots` of them.

        Args:
            rows: new states of the target, if any, then the slots.
            slots: how many of them are slots.
            rotary: of all rows.
            cache: keys and values of all that is looked at.
            columns: where the rows' own are written.
            seen: what each slot sees of the cache, or what is added to its scores; None: all.
        """
        layer, attention = self.source, self.source.self_attn
        qkv = self.qkv(layer.input_layernorm(rows)).view(len(rows), -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = attention.q_norm(q).transpose(0, 1), attention.k_norm(k).transpose(0, 1)
        q, k = apply_rotary_pos_emb(q[None], k[None], *rotary)
        cache.index_copy_(2, columns, torch.stack([k[0], v.transpose(0, 1)]).to(cache.dtype))
        out = F.scaled_dot_product_attention(
            q[:, :, -slots:],
            cache[:1],
            cache[1:],
            attn_mask=None if seen is None else seen[:, None],
            enable_gqa=self.heads != self.kv_heads,
        )
        x_KH = self.out.add(out[0].transpose(0, 1).flatten(1), rows[-slots:])
        normed = layer.post_attention_layernorm(x_KH)
        activated = layer.mlp.activation(self.gate(normed))
        return self.down.add(self.up.times(normed, activated), x_KH)
