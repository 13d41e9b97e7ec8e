"""Decoding with the block-diffusion drafter: one pass over [what the target newly saw, a block of masks] a draft.

Legend: M new context positions, K slots, k of them wanted, m candidates, F tapped states, H hidden size.
"""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.drafters.block_layers import block_layers
from zerodraft.drafters.block_model import BlockDrafterModel
from zerodraft.drafters.recorded_block import RecordedDrafts, can_be_recorded, recorded_size
from zerodraft.drafters.tapped import FIRST_SLOTS, TappedRow, TappedSession, grown, on_host, readable_weights, release
from zerodraft.fast.graphed import CudaGraphs
from zerodraft.fast.int8 import rounded_linear
from zerodraft.fast.packed import PackedLinear
from zerodraft.fast.recorded import FIRST_ROOM, Recorder, RecordingError
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve

logger = logging.getLogger(__name__)


class BlockDrafter:
    """A `Drafter` (see `decoding.protocols`) around a trained `BlockDrafterModel` and the target that it was made for.

    Args:
        model: the network; its weights are copied into the order that the CPU's kernels like best.
        target: whose embeddings and LM head are used; only read.
        candidates: tokens per position in the lattice.
        rounded: keep the weights in bfloat16 or int8, whatever this machine multiplies fastest: drafts lose a little,
            a pass on a CPU takes half the time.
        recorder: Makes what records drafts on a device, instead of CUDA graphs; then on any device.

    Raises:
        ZerodraftError: the drafter was made for a target of another size, the target's embeddings cannot be read, or
            nothing here multiplies rounded weights.
    """

    def __init__(
        self,
        model: BlockDrafterModel,
        target: PreTrainedModel,
        candidates: int = 16,
        *,
        rounded: bool = False,
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        self.model = model.eval()
        self.taps = tuple(model.config.layers)
        self.max_length = model.config.block_size
        self.candidates = min(candidates, len(model.draft_ids))
        self.check(target.config)
        self.embedding, head = readable_weights(target)
        device = target.device
        linear = rounded_linear(device) if rounded else PackedLinear
        if linear is None:
            raise ZerodraftError(f"There is no kernel for rounded weights on '{device}': leave rounded out.")
        with torch.no_grad():
            self.head = linear(head[model.draft_ids.to(device)])
            like: Any = head  # its device and dtype; transformers' wrapper of `to` hides torch's types
            model.to(like)
            self.slots = linear.of(model.slots)
            self.coupling = None if model.coupling is None else _FastCoupling(model, self.embedding, head)
            self.layers = block_layers(model, linear)
        self.draft_ids = model.draft_ids
        self.recorder = recorder or (CudaGraphs if device.type == "cuda" else None)
        """None: drafts are not recorded."""
        self._idle: deque[RecordedDrafts] = deque(maxlen=1)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], target: PreTrainedModel, candidates: int = 16, *, rounded: bool | None = None
    ) -> "BlockDrafter":
        """Loads what `BlockDrafterModel.save_pretrained` (and so `zerodraft train-drafter`) wrote.

        `path` is the directory, a training run's folder or a hub id. `rounded` is as in the class; None: where this
        machine can.

        Raises:
            ZerodraftError: nothing to load there, a damaged checkpoint, or one that does not fit the target.
        """
        model = load_block(path)
        if rounded is None:
            rounded = rounded_linear(target.device) is not None
        drafter = cls(model, target, candidates, rounded=rounded)
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
        """A session for `batch` rows; drafts of a single one are recorded on a GPU (`recorded_block.py`)."""
        return TappedSession([_Row(self, self._recording() if batch == 1 else None) for _ in range(batch)])

    def _recording(self) -> RecordedDrafts | None:
        """Buffers for a text, with what an earlier one has recorded if nobody uses it and it still holds."""
        if self.recorder is None or not can_be_recorded(self.model, self.layers):
            return None
        held = (self.embedding, *self.model.parameters(), *self.model.buffers())
        mark = (self.recorder, tuple((tensor.data_ptr(), tensor.dtype) for tensor in held))
        # taken out while it is in use: another text that is decoded at the same time gets its own
        with suppress(IndexError):
            recording = self._idle.pop()
            if recording.mark == mark:
                return recording
        return RecordedDrafts(self.recorder, mark, self.new_cache(FIRST_ROOM), len(self.model.norm.weight))

    def release(self) -> None:
        """Forgets what was recorded; the memory is free when no text uses it any more."""
        self._idle.clear()

    def new_cache(self, positions: int) -> Float[Tensor, "F 2 nk S D"]:
        """Zeros, where keys and values of one row of text will be."""
        first: Any = self.model.layers[0]
        attention = first.self_attn
        shape = (len(self.model.layers), 2, attention.num_kv_heads, positions, attention.head_dim)
        return self.model.norm.weight.new_zeros(shape)

    def compute(
        self,
        state: Float[Tensor, " H"],
        newest: Int[Tensor, "1"],
        layers: Callable[[Tensor], Tensor],
        length: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Candidates (k, m), their log-probabilities and, with a coupling, those of pairs (k, m, m).

        Args:
            state: the first tap at the last position that has states.
            newest: the token behind it.
            layers: runs the layers over the slots.
            length: how many slots are wanted; None: all.
        """
        # torch asks a GPU for the number that a tensor without dimensions indexes by, and waits
        embedding = self.embedding.index_select(0, newest)[0]
        entry = self.model.entry(state, embedding)[None]
        x_KH = layers(state + self.slots(entry).view(self.max_length, -1))
        states_KH = self.model.norm(x_KH)[:length]
        logits = self.head(states_KH)
        scores, columns = logits.topk(self.candidates)
        log_q = scores.float() - logits.float().logsumexp(-1, keepdim=True)
        ids = self.draft_ids[columns]
        if self.coupling is None:
            return ids, log_q
        return ids, log_q, self.coupling(states_KH, embedding, columns, scores, log_q)


def load_block(path: str | PathLike[str]) -> BlockDrafterModel:
    """The network alone, in float32.

    Raises:
        ZerodraftError: nothing to load there, or a damaged checkpoint.
    """
    model = load_pretrained(BlockDrafterModel, resolve(path), dtype=torch.float32)
    assert isinstance(model, BlockDrafterModel)
    return model


class _Row(TappedRow):
    """Keys and values of one row's context."""

    def __init__(self, drafter: BlockDrafter, recorded: RecordedDrafts | None = None) -> None:
        super().__init__()
        self.drafter, self.recorded = drafter, recorded
        self.cache = drafter.new_cache(FIRST_SLOTS) if recorded is None else recorded.begin()
        if recorded is not None:
            weakref.finalize(self, drafter._idle.append, recorded).atexit = False

    def draft(self, length: int) -> Lattice:
        drafter, start = self.drafter, self.length
        taps_MFH = self.take_pending(drafter.model.norm.weight)
        new = len(taps_MFH)
        size = recorded_size(new) if self.recorded else None
        self.cache = grown(self.cache, start + (size or new) + drafter.max_length)
        self.length += new
        newest = self.newest.to(taps_MFH.device)[None]
        if self.recorded is not None and size is not None:
            try:
                layers: Any = drafter.layers
                arrays = self.recorded.draft(drafter.compute, layers, self.cache, start, taps_MFH, newest)
                return _lattice([array[:length] for array in arrays])
            except RecordingError as error:
                logger.warning("drafts are made one kernel after another, as they could not be recorded: %s", error)
                drafter.recorder = self.recorded = None
        found = drafter.compute(
            taps_MFH[-1, 0], newest, lambda x: drafter.layers(taps_MFH, x, self.cache, start), length
        )
        return _lattice(on_host(*found))


def _lattice(arrays: Sequence[Any]) -> Lattice:
    ids, log_q, *pairs = arrays
    return Lattice(ids, log_q, pairs=pairs[0] if pairs else None)


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
