"""Decoding with DFlash drafters, ours and published ones: one pass over a block of masks a draft.

Keys and values of the target's states stay cached, for all layers from one product: unlike in our own block drafter all
layers see the same context. The block's own keys and values lie behind the context and are overwritten next time.

Legend: M new context positions, S slots of a block (the last token and the masks), H hidden size, nq query heads, nk
key/value heads, D head size, L layers.
"""

from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zerodraft.decoding.lattice import Lattice
from zerodraft.drafters.block_model import BlockLayer
from zerodraft.drafters.dflash_files import load_dflash
from zerodraft.drafters.dflash_model import DFlashModel, check_fits, embed, visible
from zerodraft.drafters.tapped import (
    FIRST_SLOTS,
    PackedLayer,
    TappedRow,
    TappedSession,
    grown,
    on_host,
    reach,
    readable_weights,
    release,
)
from zerodraft.fast.packed import PackedLinear


class DFlashDrafter:
    """A `Drafter` (see `decoding.protocols`) around a DFlash network and the target that it was made for.

    Args:
        model: the network; its weights are copied into the order that the CPU's kernels like best.
        target: whose embeddings and LM head are used; only read.
        candidates: tokens per position in the lattice.

    Raises:
        ZerodraftError: the drafter was made for a target of another size.
    """

    def __init__(self, model: DFlashModel, target: PreTrainedModel, candidates: int = 16) -> None:
        head: Any = target.get_output_embeddings()
        readable_weights(target)
        self.model = model.to(head.weight).eval().bind(target)  # its device and dtype
        self.target = target
        self.taps = tuple(model.config.layers)
        self.max_length = model.config.block_size
        self.candidates = min(candidates, len(head.weight))
        with torch.no_grad():
            self.head = PackedLinear(head.weight, head.bias)
            layers = [layer for layer in model.layers if isinstance(layer, BlockLayer)]
            self.layers = [PackedLayer(layer) for layer in layers]
            parts = [part for layer in layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
            biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
            self.context = PackedLinear(
                torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None
            )

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], target: PreTrainedModel, candidates: int = 16
    ) -> "DFlashDrafter":
        """Loads a drafter that `zerodraft train-drafter --kind dflash` wrote, or one published for another runtime.

        Raises:
            ZerodraftError: nothing to load there, a damaged checkpoint, or one that does not fit the target.
        """
        drafter = cls(load_dflash(path), target, candidates)
        release(drafter.model.layers)
        return drafter

    def check(self, config: Any) -> None:
        """Raises `ZerodraftError` unless a target with this config has the sizes that the drafter was made for."""
        check_fits(self.model.config, config)

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> TappedSession:
        """A session for `batch` rows."""
        return TappedSession([_Row(self) for _ in range(batch)])


class _Row(TappedRow):
    """Keys and values of one row's context."""

    def __init__(self, drafter: DFlashDrafter) -> None:
        config = drafter.model.config
        super().__init__()
        self.drafter = drafter
        shape = (len(drafter.layers), 2, config.num_key_value_heads, FIRST_SLOTS, config.head_dim)
        self.cache = drafter.model.norm.weight.new_zeros(shape)

    def draft(self, length: int) -> Lattice:
        drafter, model, config = self.drafter, self.drafter.model, self.drafter.model.config
        taps_MFH = self.take_pending(model.norm.weight)
        new, slots = len(taps_MFH), config.block_size + 1
        known, end = self.length + new, self.length + new + slots
        self.cache = grown(self.cache, end)
        places = torch.arange(self.length, end, device=taps_MFH.device)
        cos, sin = model.rotate(places[None])
        self._write(model.fused(taps_MFH), (cos[:, :new], sin[:, :new]))
        self.length = known
        token = (model.embedding_scale * embed(drafter.target, self.newest)).to(taps_MFH)
        x_SH = torch.cat([token[None], model.mask_embedding.expand(slots - 1, -1)])
        rotary = cos[:, new:], sin[:, new:]
        width = reach(places.device, end, self.cache.shape[-2])
        keys = torch.arange(width, device=places.device)
        written = None if width == end else (keys < end).expand(1, slots, -1)
        for i, layer in enumerate(drafter.layers):
            window = config.window(i)
            # a window that holds all places hides nothing unless it looks back only
            seen = written
            if window is not None and (config.causal_sliding or window < end):
                near = visible(places[None, new:], keys[None], window, config.causal_sliding)
                seen = near if near is None or written is None else near & written
            x_SH = layer(x_SH, slots, rotary, self.cache[i, :, :, :width], places[new:], seen)
        log_q = model.scaled(drafter.head(model.norm(x_SH)[1 : length + 1]).float()).log_softmax(-1)
        top = log_q.topk(drafter.candidates)
        ids, values = on_host(top.indices, top.values)
        return Lattice(ids, values)

    def _write(self, feature_MH: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Keys and values of new context, of all layers."""
        drafter = self.drafter
        shape = (len(feature_MH), len(drafter.layers), 2, self.cache.shape[2], self.cache.shape[4])
        keys_values = drafter.context(feature_MH).view(shape)
        end = self.length + len(feature_MH)
        for i, layer in enumerate(drafter.layers):
            k = layer.source.self_attn.k_norm(keys_values[:, i, 0]).transpose(0, 1)
            k, _ = apply_rotary_pos_emb(k[None], k[None], *rotary)
            self.cache[i, 0, :, self.length : end] = k[0]
            self.cache[i, 1, :, self.length : end] = keys_values[:, i, 1].transpose(0, 1)
