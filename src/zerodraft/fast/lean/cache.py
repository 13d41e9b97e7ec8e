"""The keys and values of the lean decode path, and where in them the tokens of a pass stand.

A row's cached tokens lie in the slots 0, 1, ... of the buffer without holes, so a slot is a position. The tokens of the
last call lie behind the longest row until `keep` moves those that stay. Where a prompt's mask has holes, they count for
sliding windows: a token's *place* is its slot and the holes before it.

Legend: B rows of the batch, T tokens of one call, S slots of the buffer.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from zerodraft.fast.compiled import CPU
from zerodraft.fast.lean.passes import Tokens
from zerodraft.fast.lean.weights import LeanWeights, rotations

_FIRST_SLOTS = 256


class LeanCache:
    """One buffer for all executions of layers, allocated ahead.

    **Fields:** `kv` (executions, B, heads of keys and then of values, S, D); `lengths` of the rows; `slots`, the
    longest's.
    """

    def __init__(self, weights: LeanWeights) -> None:
        self._weights = weights
        self._windows = {layer.window for layer in weights.layers}
        self.lengths: list[int] = []
        self.slots = 0
        self.kv = torch.empty(0, dtype=torch.float32, device=CPU)
        self._padding: list[int] = []
        self._rows = torch.empty(0, 1, dtype=torch.int64, device=CPU)
        # holes before each slot (B, S) and in the whole row (B, 1); None as long as no mask has one
        self.gaps: Tensor | None = None
        self._holes = self._rows
        self._rope = torch.empty(0, dtype=torch.complex64, device=CPU)

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.kv.nbytes + self._rope.nbytes

    @torch.inference_mode()
    def make_room(self, batch: int, count: int) -> None:
        """Makes room for this many more tokens of each row."""
        weights = self._weights
        if not self.lengths:
            self.lengths, self._padding = [0] * batch, [0] * batch
            self._rows = self._holes = torch.zeros(batch, 1, dtype=torch.int64, device=CPU)
        needed, capacity = self.slots + count, self._rope.shape[0]
        if needed <= capacity:
            return
        capacity = max(2 * capacity, needed + _FIRST_SLOTS)
        shape = len(weights.layers), batch, 2 * weights.kv_heads, capacity, weights.head_dim
        kv = torch.empty(shape, dtype=torch.float32, device=CPU)
        # a draft's tokens lie behind those that are kept
        old = self.kv.shape[3] if self.kv.ndim == 5 else 0
        if old:
            kv[:, :, :, :old] = self.kv
        self.kv = kv
        self._rope = rotations(torch.arange(capacity, device=CPU), weights.frequencies, weights.rope_scale)
        if self.gaps is not None:
            self.gaps = torch.cat([self.gaps, self._holes.expand(-1, capacity - self.gaps.shape[1])], 1)

    @torch.inference_mode()
    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep the tokens in these slots behind the longest row, one rising list a row."""
        for row, indices in enumerate(kept):
            count, end = len(indices), self.lengths[row]
            if count and (end != self.slots or indices[-1] != count - 1):
                source = torch.tensor(indices, device=CPU) + self.slots
                self.kv[:, row, :, end : end + count] = self.kv[:, row].index_select(2, source)
            self.lengths[row] = end + count
        self.slots = max(self.lengths)
        if len(kept) > 1:
            self._rows = torch.tensor(self.lengths, device=CPU)[:, None]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond these lengths, one for each row."""
        self.lengths = [min(known, length) for known, length in zip(self.lengths, lengths, strict=True)]
        self.slots = max(self.lengths, default=0)
        self._rows = torch.tensor(self.lengths, device=CPU)[:, None]

    def columns(self) -> list[Int[Tensor, " n"]]:
        """Where `generate` has each row's tokens: behind the padding, with the holes that the prompt's mask has."""
        places = []
        for row, (pad, length) in enumerate(zip(self._padding, self.lengths, strict=True)):
            place = torch.arange(pad, pad + length, device=CPU)
            places.append(place if self.gaps is None else place + self.gaps[row, :length] - self._holes[row])
        return places

    def newest(self, row: int, count: int) -> Sequence[int]:
        """The columns of a row's last tokens."""
        end = self.lengths[row]
        if self.gaps is None:
            return range(self._padding[row] + end - count, self._padding[row] + end)
        return self.columns()[row][end - count :].tolist()

    def width(self) -> int:
        """How many columns there are."""
        return max(pad + length for pad, length in zip(self._padding, self.lengths, strict=True))

    def export(self, cache: Cache, columns: int | None = None) -> None:
        """Put the text's keys and values (or those of its first columns) into an empty cache of transformers, at the
        columns that `generate` would give them."""
        width = self.width() if columns is None else min(self.width(), columns)
        places = [place[place < width] for place in self.columns()]
        for index, kv in enumerate(self.kv):
            text = kv.new_zeros(*kv.shape[:2], width, kv.shape[3])
            for row, place in enumerate(places):
                text[row, :, place] = kv[row, :, : len(place)]
            keys, values = text.split(self._weights.kv_heads, 1)
            keys = keys.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            cache.update(keys, values.contiguous(), index)

    # -- prompts --------------------------------------------------------------------------------------------------

    def new_gaps(self, mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
        """The holes of a row before each column of a piece of the prompts, those of former pieces included; None if no
        row has any. What is before a row's first token is padding and no hole."""
        begun = (mask.cumsum(-1) > 0) | (torch.tensor(self.lengths, device=CPU) > 0)[:, None]
        gaps = (begun & ~mask).cumsum(-1) + self._holes
        return gaps if bool(gaps.any()) else None

    @torch.inference_mode()
    def keep_prompts(self, mask: Bool[Tensor, "B T"], gaps: Int[Tensor, "B T"] | None) -> list[list[int]]:
        """Keep what is no padding of a piece of the prompts; which that is, a list a row."""
        kept = [row.nonzero().flatten().tolist() for row in mask]
        if gaps is not None:
            if self.gaps is None:
                self.gaps = torch.zeros(len(gaps), self._rope.shape[0], dtype=torch.int64, device=CPU)
            self._holes = gaps[:, -1:]
            for row, length in enumerate(self.lengths):
                before = gaps[row, mask[row]]
                self.gaps[row, length:] = self._holes[row]
                self.gaps[row, length : length + len(before)] = before
        self._padding = [known + mask.shape[1] - len(row) for known, row in zip(self._padding, kept, strict=True)]
        self.keep(kept)
        return kept

    # -- a pass ---------------------------------------------------------------------------------------------------

    def tokens(
        self,
        depth: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T F"] | None,
        *,
        drafted: Int[Tensor, "B P"] | None = None,
        gaps: Int[Tensor, "B _"] | None = None,
    ) -> Tokens:
        """The tokens of a call, the last T of the F that lie behind the longest row.

        Args:
            depth: Distance from the row's cached end.
            visible: Which of the F each one sees; None: those up to itself.
            drafted: Distances of the F - T before them, if there are any.
            gaps: Holes before each token, where that is not all holes of the row.
        """
        if gaps is None and self.gaps is not None:
            gaps = self._holes
        batch, count = depth.shape
        fresh = depth if drafted is None else torch.cat([drafted, depth], 1)
        biases = {window: self._bias(depth, fresh, visible, window, gaps) for window in self._windows}
        # the mask of one text without a window says nothing about what is cached
        whole = batch > 1 or any(window is not None and bias is not None for window, bias in biases.items())
        return Tokens(
            turns=self._rope.index_select(0, (depth + (self._rows if batch > 1 else self.slots)).flatten()),
            biases=biases,
            past=self.slots + fresh.shape[1] - count,
            seen=self.slots + fresh.shape[1],
            causal=visible is None and self.slots == 0 and count > 1,
            masked_from=0 if whole else self.slots,
        )

    def one_by_one(self, count: int) -> Tokens | None:
        """Tokens of the only text that are run one after the other, each of which sees all before it; None if a window
        hides some."""
        end = self.slots + count
        if any(window is not None and (end > window or self.gaps is not None) for window in self._windows):
            return None
        return Tokens(turns=self._rope[self.slots : end], biases={}, past=self.slots, seen=end)

    def _bias(
        self, depth: Tensor, fresh: Tensor, visible: Tensor | None, window: int | None, gaps: Tensor | None
    ) -> Float[Tensor, "B 1 T S"] | None:
        """What is added to the attention scores: 0 where a query sees a slot; None if it sees all, or if `visible` is
        None and the attention is causal over nothing but these tokens."""
        batch, count = depth.shape
        past, behind = self.slots, fresh.shape[1]
        if window is not None and past + behind + (0 if gaps is None else int(gaps.max())) <= window:
            window = None
        sees_all = behind == 1 or (visible is None and (count == 1 or past == 0))
        if window is None and batch == 1 and sees_all:
            return None
        bias = torch.zeros(batch, 1, count, past + behind, dtype=torch.float32, device=CPU)
        if visible is None:
            visible = torch.ones(1, count, behind, dtype=torch.bool, device=CPU).tril_(behind - count)
        bias[..., past:].masked_fill_(~visible[:, None], -torch.inf)
        slots = torch.arange(past, device=CPU)
        if batch > 1:
            bias[..., :past].masked_fill_((slots >= self._rows)[:, None, None], -torch.inf)
        if window is not None:
            own, others = (x if gaps is None else x + gaps for x in (depth, fresh))
            first = (own + (self._rows if batch > 1 else past))[:, None, :, None] - window
            cached = slots if self.gaps is None else (slots + self.gaps[:, :past])[:, None, None]
            bias[..., :past].masked_fill_(cached <= first, -torch.inf)
            far = own[:, :, None] - others[:, None, :] >= window
            bias[..., past:].masked_fill_(far[:, None], -torch.inf)
        return bias
