"""The lean decode path: a Llama-like model in float32 on a CPU, with little but the matrix products left in a step. Its
layers may be cycled: what a Zero Token Transformer adds is in `lean_ztt`.

Packed weights, queries, keys and values from one product, activations and sums inside the products, one key-value
buffer that is allocated ahead. Where kernels can be compiled, a pass's layers are one call (`lean_compiled`). Same
results as the model's own forward up to rounding; the model is only read.

Legend: B rows of the batch, T tokens of one call, N = B*T, H hidden size, D head size, S slots of the buffer.
"""

import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from zerodraft.decoding.protocols import Target, TargetOutput
from zerodraft.ztt.interface import Once

from .check import scores_as_model
from .compiled import CPU
from .lean_weights import LeanWeights, lean_weights, release_lean, rotations

_FIRST_SLOTS = 256


def lean_target(model: nn.Module) -> "LeanTarget | None":
    """A fresh target over the model's packed weights, or None for a model that this path cannot compute exactly:
    another family, dtype or device, quantised layers, adapters, hooks, frequencies that depend on the length, dropout;
    of Zero Token Transformers those with per-cycle LoRA, and within a `generate` that was given an exit rule.

    The first call packs the weights (a second copy of them in memory) and compares them with the model's own forward
    pass on a few tokens; they are kept for later calls until the model changes, is gone, or `release` is called. Where
    the two differ, a warning says so, and the answer is None.
    """
    weights = lean_weights(model, _accept)
    return None if weights is None else LeanTarget(weights, model)


def _accept(model: nn.Module, weights: LeanWeights) -> bool:
    windows = [layer.window for layer in weights.layers if layer.window is not None]
    return scores_as_model(model, LeanTarget(weights, model), min(windows, default=None))


class LeanTarget:
    """`zerodraft.decoding.protocols.Target` over packed weights.

    A row's cached tokens lie in the slots 0, 1, ... of the buffer without holes, so a slot is a position. The tokens of
    the last call lie behind the longest row until `keep` moves those that stay. Where a prompt's mask has holes, they
    count for sliding windows: a token's *place* is its slot and the holes before it.
    """

    def __init__(self, weights: LeanWeights, model: nn.Module) -> None:
        self.device = CPU
        self._model = weakref.ref(model)
        self._weights = weights
        self._lengths: list[int] = []
        self._padding: list[int] = []
        self._rows = torch.empty(0, 1, dtype=torch.int64, device=CPU)
        # holes before each slot (B, S) and in the whole row (B, 1); None as long as no mask has one
        self._gaps: Tensor | None = None
        self._holes = self._rows
        self._slots = 0
        self._kv = torch.empty(0, dtype=torch.float32, device=CPU)
        self._rope = torch.empty(0, dtype=torch.complex64, device=CPU)

    def release(self) -> None:
        """Give back the memory of the cache and of the model's packed weights. The target is of no use afterwards."""
        if (model := self._model()) is not None:
            release_lean(model)
        del self._weights, self._kv, self._rope

    @torch.no_grad()
    def prefill(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], taps: Sequence[int]) -> TargetOutput:
        """Cache prompts and score what follows them; see the protocol."""
        batch, count = ids.shape
        self._make_room(batch, count)
        whole = bool(mask.all())
        gaps = None if whole else self._new_gaps(mask)
        if whole and batch == 1:
            depth, visible = torch.arange(count, device=CPU)[None], None
        else:
            # padding sees itself, so that its scores stay finite; nobody else sees it
            depth = (mask.cumsum(-1) - 1).clamp_(min=0)
            visible = (torch.ones(count, count, dtype=torch.bool, device=CPU).tril() & mask[:, None, :]).logical_or_(
                torch.eye(count, dtype=torch.bool, device=CPU)
            )
        output = self._forward(ids, depth, visible, taps, gaps, last_only=True)
        if whole:
            kept = [range(count)] * batch
        else:
            kept = [row.nonzero().flatten().tolist() for row in mask]
        if gaps is not None:
            self._note(gaps, mask)
        self._padding = [known + count - len(row) for known, row in zip(self._padding, kept, strict=True)]
        self.keep(kept)
        return output

    @torch.no_grad()
    def score(
        self,
        ids: Int[Tensor, "B T"],
        depth: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T T"],
        taps: Sequence[int],
    ) -> TargetOutput:
        """Score more tokens after what is cached; see the protocol."""
        self._make_room(*ids.shape)
        return self._forward(ids, depth, visible, taps, last_only=False)

    @torch.inference_mode()
    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these of the last call's tokens, one rising list of indices a row; see the protocol."""
        for row, indices in enumerate(kept):
            count, end = len(indices), self._lengths[row]
            if count and (end != self._slots or indices[-1] != count - 1):
                source = torch.tensor(indices, device=CPU) + self._slots
                self._kv[:, row, :, end : end + count] = self._kv[:, row].index_select(2, source)
            self._lengths[row] = end + count
        self._slots = max(self._lengths)
        if len(kept) > 1:
            self._rows = torch.tensor(self._lengths, device=CPU)[:, None]

    @property
    def nbytes(self) -> int:
        """See `LastingTarget.nbytes`."""
        return self._kv.nbytes + self._rope.nbytes

    def goes_on_from(self, earlier: Target) -> bool:
        """See `LastingTarget.goes_on_from`."""
        return isinstance(earlier, LeanTarget) and self._weights is earlier._weights and earlier._gaps is None

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond these lengths, one for each row."""
        self._lengths = [min(known, length) for known, length in zip(self._lengths, lengths, strict=True)]
        self._slots = max(self._lengths, default=0)
        self._rows = torch.tensor(self._lengths, device=CPU)[:, None]

    def export(self, cache: Cache, columns: int | None = None) -> None:
        """Put the text's keys and values (or those of its first columns) into an empty cache of transformers, at the
        columns that `generate` would give them: behind the padding, with the holes that the prompt's mask has."""
        weights = self._weights
        width = max(pad + length for pad, length in zip(self._padding, self._lengths, strict=True))
        width = width if columns is None else min(width, columns)
        places = []
        for row, (pad, length) in enumerate(zip(self._padding, self._lengths, strict=True)):
            place = torch.arange(pad, pad + length, device=CPU)
            place = place if self._gaps is None else place + self._gaps[row, :length] - self._holes[row]
            places.append(place[place < width])
        for index, kv in enumerate(self._kv):
            text = kv.new_zeros(*kv.shape[:2], width, kv.shape[3])
            for row, place in enumerate(places):
                text[row, :, place] = kv[row, :, : len(place)]
            keys, values = text.split(weights.kv_heads, 1)
            keys = keys.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            cache.update(keys, values.contiguous(), index)

    @torch.inference_mode()
    def _make_room(self, batch: int, count: int) -> None:
        weights = self._weights
        if not self._lengths:
            self._lengths, self._padding = [0] * batch, [0] * batch
            self._rows = self._holes = torch.zeros(batch, 1, dtype=torch.int64, device=CPU)
        needed, capacity = self._slots + count, self._rope.shape[0]
        if needed <= capacity:
            return
        capacity = max(2 * capacity, needed + _FIRST_SLOTS)
        shape = len(weights.layers), batch, 2 * weights.kv_heads, capacity, weights.head_dim
        kv = torch.empty(shape, dtype=torch.float32, device=CPU)
        if self._slots:
            kv[:, :, :, : self._slots] = self._kv[:, :, :, : self._slots]
        self._kv = kv
        self._rope = rotations(torch.arange(capacity, device=CPU), weights.frequencies, weights.rope_scale)
        if self._gaps is not None:
            self._gaps = torch.cat([self._gaps, self._holes.expand(-1, capacity - self._gaps.shape[1])], 1)

    def _new_gaps(self, mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
        """The holes of a row before each column of a piece of the prompts, those of former pieces included; None if no
        row has any. What is before a row's first token is padding and no hole."""
        begun = (mask.cumsum(-1) > 0) | (torch.tensor(self._lengths, device=CPU) > 0)[:, None]
        gaps = (begun & ~mask).cumsum(-1) + self._holes
        return gaps if bool(gaps.any()) else None

    @torch.inference_mode()
    def _note(self, gaps: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> None:
        """Note the holes before the tokens of a piece of the prompts, which are about to be kept."""
        if self._gaps is None:
            self._gaps = torch.zeros(len(gaps), self._rope.shape[0], dtype=torch.int64, device=CPU)
        self._holes = gaps[:, -1:]
        for row, length in enumerate(self._lengths):
            before = gaps[row, mask[row]]
            self._gaps[row, length:] = self._holes[row]
            self._gaps[row, length : length + len(before)] = before

    def _rotations(self, depth: Tensor) -> Tensor:
        """What multiplies each pair of elements of a position's queries and keys: (N, D/2)."""
        return self._rope.index_select(0, (depth + (self._rows if depth.shape[0] > 1 else self._slots)).flatten())

    def _turns(self, depth: Tensor) -> Tensor:
        """The same with ones for the values: (N, heads, D/2)."""
        weights = self._weights
        turning = weights.heads + weights.kv_heads
        shape = depth.numel(), turning + weights.kv_heads, weights.head_dim // 2
        turns = torch.ones(shape, dtype=torch.complex64, device=CPU)
        turns[:, :turning] = self._rotations(depth)[:, None]
        return turns

    def _bias(
        self, depth: Tensor, visible: Tensor | None, window: int | None, gaps: Tensor | None
    ) -> Float[Tensor, "B 1 T S"] | None:
        """What is added to the attention scores: 0 where a query sees a slot; None if it sees all, or if `visible` is
        None and the attention is causal over nothing but these tokens. `gaps` are the holes before each token."""
        batch, count = depth.shape
        past = self._slots
        if window is not None and past + count + (0 if gaps is None else int(gaps.max())) <= window:
            window = None
        if window is None and batch == 1 and (count == 1 or (visible is None and past == 0)):
            return None
        bias = torch.zeros(batch, 1, count, past + count, dtype=torch.float32, device=CPU)
        if visible is None:
            visible = torch.ones(1, count, count, dtype=torch.bool, device=CPU).tril_()
        bias[..., past:].masked_fill_(~visible[:, None], -torch.inf)
        slots = torch.arange(past, device=CPU)
        if batch > 1:
            bias[..., :past].masked_fill_((slots >= self._rows)[:, None, None], -torch.inf)
        if window is not None:
            places = depth if gaps is None else depth + gaps
            first = (places + (self._rows if batch > 1 else past))[:, None, :, None] - window
            cached = slots if self._gaps is None else (slots + self._gaps[:, :past])[:, None, None]
            bias[..., :past].masked_fill_(cached <= first, -torch.inf)
            far = places[:, :, None] - places[:, None, :] >= window
            bias[..., past:].masked_fill_(far[:, None], -torch.inf)
        return bias

    def _forward(
        self,
        ids: Tensor,
        depth: Tensor,
        visible: Tensor | None,
        taps: Sequence[int],
        gaps: Tensor | None = None,
        *,
        last_only: bool,
    ) -> TargetOutput:
        weights = self._weights
        if gaps is None and self._gaps is not None:
            gaps = self._holes
        batch, count = ids.shape
        one_row = last_only and batch == 1 and len(weights.layers) not in taps
        biases = {w: self._bias(depth, visible, w, gaps) for w in {layer.window for layer in weights.layers}}
        x, tapped = self._layers(ids, depth, visible, biases, taps, last_only=one_row)
        # from here on outside of inference mode, so that callers may write into what they get
        wanted = None
        if taps:
            if len(weights.layers) in taps:
                # the last of transformers' hidden states is behind the final norm
                tapped[len(weights.layers)] = F.rms_norm(x, x.shape[-1:], weights.final_gain, weights.eps)
            wanted = torch.stack([tapped[tap] for tap in taps], dim=1).view(batch, count, len(taps), -1)
        if last_only:
            x = x.view(batch, count, -1)[:, -1]
        logits = weights.head(_unit(x, weights.floor)).view(batch, 1 if last_only else count, -1)
        return TargetOutput(logits=logits, taps=wanted)

    @torch.inference_mode()
    def _layers(
        self,
        ids: Tensor,
        depth: Tensor,
        visible: Tensor | None,
        biases: Mapping[int | None, Tensor | None],
        taps: Sequence[int],
        *,
        last_only: bool,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The residual stream behind the last layer (N, H), of which perhaps only the last row is right, and the tapped
        states."""
        weights = self._weights
        batch, count = ids.shape
        rows, past, end = batch * count, self._slots, self._slots + count
        q_heads, all_heads, half = weights.heads, weights.heads + 2 * weights.kv_heads, weights.head_dim // 2
        turning, floor, scale = q_heads + weights.kv_heads, weights.floor, weights.score_scale
        alone = visible is None and past == 0 and count > 1
        x = F.embedding(ids.flatten(), weights.embedding)
        if weights.compiled is not None:
            turns = self._rotations(depth)
            return x, weights.compiled(x, turns, self._kv, past, biases, taps, causal=alone, last_only=last_only)
        turns = self._turns(depth)
        seen = self._kv[:, :, :, :end]
        keys = seen[:, :, : weights.kv_heads].unbind(0)
        values = seen[:, :, weights.kv_heads :].unbind(0)
        fresh = seen[:, :, :, past:].unbind(0)
        tapped: dict[int, Tensor] = {}
        masks, head_output = Once(), x

        if 0 in taps:
            tapped[0] = x
        for index, layer in enumerate(weights.layers):
            zero, ffn_share = layer.zero, None
            if index == weights.head_layers:
                head_output = x
            if zero is not None and zero.injection is not None:
                x = torch.add(x, head_output, alpha=zero.injection)
            before = x
            qkv = layer.qkv(_unit(x, floor))
            if layer.qk_gain is not None:
                qk = qkv.view(rows, all_heads, -1)[:, :turning]
                qk.copy_(_unit(qk, weights.head_floor).mul_(layer.qk_gain))
            pairs = torch.view_as_complex(qkv.view(rows, all_heads, half, 2))
            heads = torch.view_as_real(pairs.mul_(turns)).view(batch, count, all_heads, -1).transpose(1, 2)
            fresh[index].copy_(heads[:, q_heads:])
            queries, bias = heads[:, :q_heads], biases[layer.window]
            causal = alone and bias is None
            if zero is None or zero.key is None:
                attended = F.scaled_dot_product_attention(
                    queries,
                    keys[index],
                    values[index],
                    attn_mask=bias,
                    is_causal=causal,
                    scale=scale,
                    enable_gqa=True,
                )
            else:
                attended, ffn_share = zero.attend(
                    queries,
                    keys[index],
                    values[index],
                    turns[:, 0],
                    bias=bias,
                    masks=masks,
                    is_causal=causal,
                    scale=scale,
                )
            x = layer.out.add(attended.transpose(1, 2).reshape(rows, -1), x)
            y = _unit(x, floor)
            y = layer.up.times(y, layer.gate.silu(y))
            x = layer.down.add(y, x) if ffn_share is None else torch.addcmul(x, layer.down(y), ffn_share)
            if index + 1 in taps:
                # as transformers has it: what the layer returns, which a cycle's gate and scale have not seen yet
                tapped[index + 1] = x
            if zero is not None and zero.gate is not None:
                x = torch.lerp(before, x, zero.gate)
            if zero is not None and zero.scale is not None:
                x = x * zero.scale
        return x, tapped


def _unit(x: Tensor, floor: Tensor) -> Tensor:
    """RMS norm but for the gain and a factor of sqrt(width), which the weights have taken in: the hypotenuse is
    sqrt(sum of squares + width * eps)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, floor)
