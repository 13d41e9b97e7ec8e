"""Decoding with the block-diffusion drafter: one pass over [what the target newly saw, a block of masks] a draft.

The keys and values of the target's states stay cached. New states and the block go through each layer together, as a
few more rows cost next to nothing; the block's own keys and values lie behind the context and are overwritten next
time. The block sees everything that is there, so attention needs no mask.

Legend: R rows of one pass (M new context positions, then K slots), H hidden size, nq query heads, nk key/value heads,
D head size.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.block_model import BlockDrafterModel, BlockLayer
from zerodraft.errors import ZerodraftError
from zerodraft.targets.int8 import Int8Linear, int8_available
from zerodraft.targets.packed import PackedLinear
from zerodraft.ztt.loading import load_pretrained

FIRST_SLOTS = 256
"""Cache positions at first; doubled when they are full."""


class BlockDrafter:
    """A `Drafter` (see `decoding.protocols`) around a trained `BlockDrafterModel` and the target that it was made for.

    Args:
        model: the network; its weights are copied into the order that the CPU's kernels like best.
        target: whose embeddings and LM head are used; only read.
        candidates: tokens per position in the lattice.
        int8: run the layers in int8: drafts lose a little, a pass on a CPU takes half the time.

    Raises:
        ZerodraftError: the drafter was made for a target of another size, or the target's embeddings cannot be read.
    """

    def __init__(
        self, model: BlockDrafterModel, target: PreTrainedModel, candidates: int = 16, *, int8: bool = False
    ) -> None:
        self.model = model.eval()
        self.taps = tuple(model.config.layers)
        self.max_length = model.config.block_size
        self.candidates = min(candidates, len(model.draft_ids))
        self.check(target.config)
        embedding: Any = target.get_input_embeddings()
        head: Any = target.get_output_embeddings()
        for weight in (embedding.weight, head.weight):
            if weight.is_meta or not weight.is_floating_point():
                state = "offloaded" if weight.is_meta else f"quantised ({weight.dtype})"
                raise ZerodraftError(
                    f"The block drafter reads the target's embeddings and LM head, but these are {state}: keep both in "
                    "memory as floats."
                )
        device = target.device
        if int8 and not int8_available(device):
            raise ZerodraftError(f"This torch has no int8 kernels for '{device}': leave int8 out.")
        linear = Int8Linear if int8 else PackedLinear
        with torch.no_grad():
            self.embedding = embedding.weight
            self.head = linear(head.weight[model.draft_ids.to(device)])
            model.to(head.weight)  # its device and dtype
            self.slots = linear.of(model.slots)
            self.coupling = None if model.coupling is None else _FastCoupling(model, self.embedding, head.weight)
            self.layers = [_FastLayer(layer, linear) for layer in model.layers if isinstance(layer, BlockLayer)]
        self.draft_ids = model.draft_ids

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], target: PreTrainedModel, candidates: int = 16, *, int8: bool | None = None
    ) -> "BlockDrafter":
        """Loads what `BlockDrafterModel.save_pretrained` (and so `zerodraft train-drafter`) wrote.

        `int8` is as in the class; None: where there are kernels for it.

        Raises:
            ZerodraftError: nothing to load there, a damaged checkpoint, or one that does not fit the target.
        """
        model = load_pretrained(BlockDrafterModel, path, dtype=torch.float32)
        assert isinstance(model, BlockDrafterModel)
        return cls(model, target, candidates, int8=int8_available(target.device) if int8 is None else int8)

    def check(self, config: Any) -> None:
        """Raises `ZerodraftError` unless a target with this config has the sizes that the drafter was made for."""
        made_for, found = self.model.config.target_config, config.get_text_config()
        for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
            if made_for.get(name) != getattr(found, name, None):
                raise ZerodraftError(
                    f"The drafter was made for a target with {name}={made_for.get(name)}, this target has "
                    f"{getattr(found, name, None)}: use the target that it was trained for, or train one for this."
                )

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "BlockSession":
        """A session for `batch` rows."""
        return BlockSession(self, batch)


class BlockSession:
    """The caches of one generate call. Rows are drafted one after another, so none depends on another."""

    def __init__(self, drafter: BlockDrafter, batch: int) -> None:
        self._drafter = drafter
        self._rows = [_Row(drafter) for _ in range(batch)]

    def observe(self, progress: Sequence[Progress]) -> None:
        """Notes the newest token and the target's states of each row."""
        for row, new in zip(self._rows, progress, strict=True):
            if len(new.tokens):
                if new.taps is None:
                    raise ZerodraftError("The block drafter needs the target's hidden states, but got none.")
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

    def __init__(self, drafter: BlockDrafter) -> None:
        self.length = 0
        self.newest = torch.zeros((), dtype=torch.long)
        self.pending: list[Tensor] = []
        self.cache: list[Tensor] = [layer.new_cache(FIRST_SLOTS) for layer in drafter.layers]

    def draft(self, drafter: BlockDrafter, length: int) -> Lattice:
        model = drafter.model
        taps_MFH = torch.cat(self.pending).to(model.norm.weight)
        self.pending = []
        new = len(taps_MFH)
        end = self.length + new + drafter.max_length
        self._grow(end)
        cos, sin = model.rotate(torch.arange(self.length, end, device=taps_MFH.device)[None])
        embedding = drafter.embedding[self.newest.to(drafter.embedding.device)]
        state = taps_MFH[-1, 0]
        x_KH = state + drafter.slots(model.entry(state, embedding)[None]).view(drafter.max_length, -1)
        for i, layer in enumerate(drafter.layers):
            x_KH = layer(x_KH, taps_MFH[:, i], (cos, sin), self.cache[i], self.length)
        self.length += new
        states_KH = model.norm(x_KH)[:length]
        logits = drafter.head(states_KH)
        scores, columns = logits.topk(drafter.candidates)
        log_q = scores.float() - logits.float().logsumexp(-1, keepdim=True)
        ids = drafter.draft_ids[columns]
        if drafter.coupling is None:
            return Lattice(ids.cpu().numpy(), log_q.cpu().numpy())
        pairs = drafter.coupling(states_KH, embedding, columns, scores, log_q)
        return Lattice(ids.cpu().numpy(), log_q.cpu().numpy(), pairs=pairs.cpu().numpy())

    def _grow(self, needed: int) -> None:
        slots = self.cache[0].shape[2]
        if needed > slots:
            more = max(needed, 2 * slots) - slots
            self.cache = [F.pad(cache, (0, 0, 0, more)) for cache in self.cache]


class _FastCoupling:
    """`BlockDrafterModel.rescored` among candidates, with all that depends on a token alone computed beforehand."""

    def __init__(self, model: BlockDrafterModel, embedding: Float[Tensor, "v H"], head: Float[Tensor, "v H"]) -> None:
        assert model.coupling is not None
        self.coupling, self.norm = model.coupling, model.token_norm
        self.state = PackedLinear.of(model.coupling.state)
        ids = model.draft_ids.to(head.device)
        # V x r, r the coupling's width: what each token adds as the one before, and what it gains as the one after
        self.before = self.coupling.token(self.norm(embedding[ids]))
        self.after = head[ids] @ self.coupling.out.weight

    def __call__(
        self,
        states: Float[Tensor, "k H"],
        newest: Float[Tensor, " H"],
        columns: Int[Tensor, "k m"],
        scores: Float[Tensor, "k m"],
        log_q: Float[Tensor, "k m"],
    ) -> Float[Tensor, "k m m"]:
        """Log-probability of each candidate after each candidate of the slot before (for slot 0, after `newest`).

        Args:
            states: final states of the slots.
            newest: the known token's embedding.
            columns: the candidates' places in the draft vocabulary.
            scores: their logits.
            log_q: their log-probabilities.
        """
        first = self.coupling.token(self.norm(newest))[None, None].expand(1, columns.shape[1], -1)
        before = torch.cat([first, self.before[columns[:-1]]])
        change = F.silu(self.state(states)[:, None] + before) @ self.after[columns].transpose(1, 2)
        return (scores[:, None] + change).float().log_softmax(-1) + log_q.logsumexp(-1)[:, None, None]


class _FastLayer:
    """A `BlockLayer` for decoding: packed weights, one product for queries, keys and values, a cache in place."""

    def __init__(self, layer: BlockLayer, linear: type[PackedLinear] | type[Int8Linear]) -> None:
        self.source = layer
        attention = layer.self_attn
        self.heads, self.kv_heads, self.head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = torch.cat([part.bias for part in parts]) if attention.q_proj.bias is not None else None
        self.qkv = linear(torch.cat([part.weight for part in parts]), bias)
        self.out = linear.of(attention.o_proj)
        self.gate, self.up = linear.of(layer.mlp.gate_proj), linear.of(layer.mlp.up_proj)
        self.down = linear.of(layer.mlp.down_proj)
        self.like = attention.k_proj.weight

    def new_cache(self, slots: int) -> Tensor:
        """Keys and values: (2, nk, slots, D)."""
        return self.like.new_zeros(2, self.kv_heads, slots, self.head_dim)

    def __call__(
        self,
        x_KH: Float[Tensor, "K H"],
        tap_MH: Float[Tensor, "M H"],
        rotary: tuple[Tensor, Tensor],
        cache: Float[Tensor, "2 nk S D"],
        start: int,
    ) -> Float[Tensor, "K H"]:
        """Writes the keys and values of all rows from `start` on, and computes the slots."""
        layer, attention = self.source, self.source.self_attn
        rows = self.qkv(layer.input_layernorm(torch.cat([tap_MH, x_KH])))
        q, k, v = rows.view(len(rows), -1, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = attention.q_norm(q).transpose(0, 1), attention.k_norm(k).transpose(0, 1)
        q, k = apply_rotary_pos_emb(q[None], k[None], *rotary)
        end = start + len(rows)
        cache[0, :, start:end], cache[1, :, start:end] = k[0], v.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q[:, :, len(tap_MH) :],
            cache[:1, :, :end],
            cache[1:, :, :end],
            enable_gqa=self.heads != self.kv_heads,
        )
        x_KH = self.out.add(out[0].transpose(0, 1).flatten(1), x_KH)
        normed = layer.post_attention_layernorm(x_KH)
        activated = layer.mlp.activation(self.gate(normed))
        return self.down.add(self.up.times(normed, activated), x_KH)
