"""Decoding with DFlash drafters, ours and published ones: one pass over a block of masks a draft.

Keys and values of the target's states stay cached, for all layers from one product: unlike in our own block drafter all
layers see the same context. The block's own keys and values lie behind the context and are overwritten next time.

Legend: M new context positions, S slots of a block (the last token and the masks), H hidden size, nq query heads, nk
key/value heads, D head size, L layers.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.block_model import BlockLayer
from zerodraft.drafters.dflash_files import load_dflash
from zerodraft.drafters.dflash_model import DFlashModel, check_fits, embed, visible
from zerodraft.errors import ZerodraftError
from zerodraft.targets.packed import PackedLinear

FIRST_SLOTS = 256
"""Cache positions at first; doubled when they are full."""


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
        for weight in (head.weight, getattr(target.get_input_embeddings(), "weight", head.weight)):
            if weight.is_meta or not weight.is_floating_point():
                raise ZerodraftError(
                    "A DFlash drafter uses the target's embeddings and LM head, but these are offloaded or quantised: "
                    "keep them in memory in floating point (device_map, modules not to convert)."
                )
        self.model = model.to(head.weight).eval().bind(target)  # its device and dtype
        self.target = target
        self.taps = tuple(model.config.layers)
        self.max_length = model.config.block_size
        self.candidates = min(candidates, len(head.weight))
        with torch.no_grad():
            self.head = PackedLinear(head.weight, head.bias)
            layers = [layer for layer in model.layers if isinstance(layer, BlockLayer)]
            self.layers = [_FastLayer(layer) for layer in layers]
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
        return cls(load_dflash(path), target, candidates)

    def check(self, config: Any) -> None:
        """Raises `ZerodraftError` unless a target with this config has the sizes that the drafter was made for."""
        check_fits(self.model.config, config)

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "DFlashSession":
        """A session for `batch` rows."""
        return DFlashSession(self, batch)


class DFlashSession:
    """The caches of one generate call. Rows are drafted one after another, so none depends on another."""

    def __init__(self, drafter: DFlashDrafter, batch: int) -> None:
        self._drafter = drafter
        self._rows = [_Row(drafter) for _ in range(batch)]

    def observe(self, progress: Sequence[Progress]) -> None:
        """Notes the newest token and the target's states of each row."""
        for row, new in zip(self._rows, progress, strict=True):
            if len(new.tokens):
                if new.taps is None:
                    raise ZerodraftError("A DFlash drafter needs the target's hidden states, but got none.")
                row.newest = new.tokens[-1]
                row.pending.append(new.taps)

    @torch.inference_mode()
    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """A lattice for each row that wants one."""
        return [
            row.draft(self._drafter, length) if length else Lattice.empty()
            for row, length in zip(self._rows, lengths, strict=True)
        ]


class _Row:
    """Keys and values of one row's context, and what of it has not been through the drafter yet."""

    def __init__(self, drafter: DFlashDrafter) -> None:
        config = drafter.model.config
        self.length = 0
        self.newest = torch.zeros((), dtype=torch.long)
        self.pending: list[Tensor] = []
        shape = (len(drafter.layers), 2, config.num_key_value_heads, FIRST_SLOTS, config.head_dim)
        self.cache = drafter.model.norm.weight.new_zeros(shape)

    def draft(self, drafter: DFlashDrafter, length: int) -> Lattice:
        model, config = drafter.model, drafter.model.config
        taps_MFH = torch.cat(self.pending).to(model.norm.weight)
        self.pending = []
        new, slots = len(taps_MFH), config.block_size + 1
        known, end = self.length + new, self.length + new + slots
        self._grow(end)
        places = torch.arange(self.length, end, device=taps_MFH.device)
        cos, sin = model.rotate(places[None])
        self._write(drafter, model.fused(taps_MFH), (cos[:, :new], sin[:, :new]))
        self.length = known
        token = embed(drafter.target, self.newest).to(taps_MFH)
        x_SH = torch.cat([token[None], model.mask_embedding.expand(slots - 1, -1)])
        rotary = cos[:, new:], sin[:, new:]
        for i, layer in enumerate(drafter.layers):
            window = config.window(i)
            # a window that holds all places hides nothing unless it looks back only
            seen = None
            if window is not None and (config.causal_sliding or window < end):
                keys = torch.arange(end, device=places.device)
                seen = visible(places[None, new:], keys[None], window, config.causal_sliding)
            x_SH = layer(x_SH, rotary, self.cache[i], known, seen)
        log_q = drafter.head(model.norm(x_SH)[1 : length + 1]).float().log_softmax(-1)
        top = log_q.topk(drafter.candidates)
        return Lattice(top.indices.cpu().numpy(), top.values.cpu().numpy())

    def _write(self, drafter: DFlashDrafter, feature_MH: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Keys and values of new context, of all layers."""
        shape = (len(feature_MH), len(drafter.layers), 2, self.cache.shape[2], self.cache.shape[4])
        keys_values = drafter.context(feature_MH).view(shape)
        end = self.length + len(feature_MH)
        for i, layer in enumerate(drafter.layers):
            k = layer.source.self_attn.k_norm(keys_values[:, i, 0]).transpose(0, 1)
            k, _ = apply_rotary_pos_emb(k[None], k[None], *rotary)
            self.cache[i, 0, :, self.length : end] = k[0]
            self.cache[i, 1, :, self.length : end] = keys_values[:, i, 1].transpose(0, 1)

    def _grow(self, needed: int) -> None:
        slots = self.cache.shape[3]
        if needed > slots:
            self.cache = F.pad(self.cache, (0, 0, 0, max(needed, 2 * slots) - slots))


class _FastLayer:
    """A layer for decoding: packed weights, one product for the block's queries, keys and values, a cache in place."""

    def __init__(self, layer: BlockLayer) -> None:
        self.source = layer
        attention = layer.self_attn
        self.heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = torch.cat([part.bias for part in parts]) if attention.q_proj.bias is not None else None
        self.qkv = PackedLinear(torch.cat([part.weight for part in parts]), bias)
        self.out = PackedLinear.of(attention.o_proj)
        self.gate, self.up = PackedLinear.of(layer.mlp.gate_proj), PackedLinear.of(layer.mlp.up_proj)
        self.down = PackedLinear.of(layer.mlp.down_proj)

    def __call__(
        self,
        x_SH: Float[Tensor, "S H"],
        rotary: tuple[Tensor, Tensor],
        cache: Float[Tensor, "2 nk C D"],
        start: int,
        seen: Tensor | None,
    ) -> Float[Tensor, "S H"]:
        """Writes the block's keys and values from `start` on, and computes the slots."""
        layer, attention = self.source, self.source.self_attn
        qkv = self.qkv(layer.input_layernorm(x_SH)).view(len(x_SH), -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = attention.q_norm(q).transpose(0, 1), attention.k_norm(k).transpose(0, 1)
        q, k = apply_rotary_pos_emb(q[None], k[None], *rotary)
        end = start + len(x_SH)
        cache[0, :, start:end], cache[1, :, start:end] = k[0], v.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q,
            cache[:1, :, :end],
            cache[1:, :, :end],
            attn_mask=None if seen is None else seen[:, None],
            enable_gqa=self.heads != self.kv_heads,
        )
        x_SH = self.out.add(out[0].transpose(0, 1).flatten(1), x_SH)
        normed = layer.post_attention_layernorm(x_SH)
        activated = layer.mlp.activation(self.gate(normed))
        return self.down.add(self.up.times(normed, activated), x_SH)
