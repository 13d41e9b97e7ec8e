"""Decoding with the block-diffusion drafter: one pass over [what the target newly saw, a block of masks] a draft.

The keys and values of the target's states stay cached. New states and the block go through each layer together, as a
few more rows cost next to nothing; the block's own keys and values lie behind the context and are overwritten next
time. The block sees everything that is there, so attention needs no mask.

Legend: R rows of one pass (M new context positions, then K slots), H hidden size, nq query heads, nk key/value heads,
D head size.
"""

from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from zerodraft.decoding.lattice import Lattice
from zerodraft.drafters.block_model import BlockDrafterModel, BlockLayer
from zerodraft.drafters.tapped import (
    FIRST_SLOTS,
    PackedLayer,
    TappedRow,
    TappedSession,
    grown,
    readable_weights,
    release,
)
from zerodraft.errors import ZerodraftError
from zerodraft.targets.int8 import Int8Linear, int8_available
from zerodraft.targets.packed import PackedLinear
from zerodraft.ztt.loading import load_pretrained


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
        self.embedding, head = readable_weights(target)
        device = target.device
        if int8 and not int8_available(device):
            raise ZerodraftError(f"This torch has no int8 kernels for '{device}': leave int8 out.")
        linear = Int8Linear if int8 else PackedLinear
        with torch.no_grad():
            self.head = linear(head[model.draft_ids.to(device)])
            like: Any = head  # its device and dtype; transformers' wrapper of `to` hides torch's types
            model.to(like)
            self.slots = linear.of(model.slots)
            self.coupling = None if model.coupling is None else _FastCoupling(model, self.embedding, head)
            self.layers = [PackedLayer(layer, linear) for layer in model.layers if isinstance(layer, BlockLayer)]
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
        model = load_block(path)
        drafter = cls(model, target, candidates, int8=int8_available(target.device) if int8 is None else int8)
        release(model.layers, model.slots)
        if model.coupling is not None:
            release(model.coupling.state, model.coupling.out)
        return drafter

    def check(self, config: Any) -> None:
        """Raises `ZerodraftError` unless a target with this config has the sizes that the drafter was made for."""
        made_for, found = self.model.config.target(), config.get_text_config()
        for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
            expected, size = getattr(made_for, name), getattr(found, name, None)
            if expected != size:
                raise ZerodraftError(
                    f"The drafter was made for a target with {name}={expected}, this target has {size}: use the target "
                    "that it was trained for, or train one for this."
                )

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> TappedSession:
        """A session for `batch` rows."""
        return TappedSession([_Row(self) for _ in range(batch)])


def load_block(path: str | PathLike[str]) -> BlockDrafterModel:
    """The network alone, in float32.

    Raises:
        ZerodraftError: nothing to load there, or a damaged checkpoint.
    """
    model = load_pretrained(BlockDrafterModel, path, dtype=torch.float32)
    assert isinstance(model, BlockDrafterModel)
    return model


class _Row(TappedRow):
    """Keys and values of one row's context."""

    def __init__(self, drafter: BlockDrafter) -> None:
        super().__init__()
        self.drafter = drafter
        like = drafter.model.norm.weight
        self.cache = [like.new_zeros(2, layer.kv_heads, FIRST_SLOTS, layer.head_dim) for layer in drafter.layers]

    def draft(self, length: int) -> Lattice:
        drafter, model = self.drafter, self.drafter.model
        taps_MFH = self.take_pending(model.norm.weight)
        new = len(taps_MFH)
        end = self.length + new + drafter.max_length
        self.cache = [grown(cache, end) for cache in self.cache]
        cos, sin = model.rotate(torch.arange(self.length, end, device=taps_MFH.device)[None])
        embedding = drafter.embedding[self.newest.to(drafter.embedding.device)]
        state = taps_MFH[-1, 0]
        x_KH = state + drafter.slots(model.entry(state, embedding)[None]).view(drafter.max_length, -1)
        for i, layer in enumerate(drafter.layers):
            rows_RH = torch.cat([taps_MFH[:, i], x_KH])
            x_KH = layer(rows_RH, drafter.max_length, (cos, sin), self.cache[i], self.length)
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
