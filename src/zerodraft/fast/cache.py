"""A transformers cache that can take back what it was given: the target's keys and values while drafts are verified.

Verification writes the keys and values of a whole draft tree and then keeps those of the accepted path alone. The
caches of transformers cannot drop nodes in mid-sequence, keep a different number in each row, or roll back a sliding
window; so every layer here holds the whole text, and windows are the masks' business.

Layout: what a pass adds goes to the columns from `Extent.start` on, in every row; `keep` then moves each row's kept
columns up to the end of its own text. A row's text thus sits at the columns that its tokens have in `generate`'s
sequences, and a row that has fallen behind has a gap before `start`, which the masks hide.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from zerodraft.common.errors import ZerodraftError

READABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
"""Layers of transformers whose states are kept as they were computed, oldest first."""


class Extent:
    """What all layers share: the column at which the next pass writes, and for how many columns there must be room."""

    def __init__(self, capacity: int = 0) -> None:
        self.start = 0
        self.capacity = capacity


class DraftLayer(CacheLayerMixin):
    """Keys and values of one layer in a buffer that grows by doubling."""

    def __init__(self, extent: Extent) -> None:
        super().__init__()
        self.extent = extent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Float[Tensor, "B h T d"], value_states: Float[Tensor, "B h T e"], *args, **kwargs
    ) -> tuple[Float[Tensor, "B h S d"], Float[Tensor, "B h S e"]]:
        """Write a pass's states from `extent.start` on; returns everything up to their end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.extent.start
        end = start + key_states.shape[2]
        assert self.keys is not None
        assert self.values is not None
        if end > self.keys.shape[2]:
            self.grow(max(end, self.extent.capacity, 2 * self.keys.shape[2]))
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow(self, capacity: int) -> None:
        """Make room for this many columns; what lies behind the text is not kept."""
        start = self.extent.start
        for name in ("keys", "values"):
            old = getattr(self, name)
            # zeros: a masked column must hold numbers, since zero times NaN is NaN
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :start] = old[:, :, :start]
            setattr(self, name, new)

    def move(self, rows: Tensor | None, source: Tensor, target: Tensor | slice) -> None:
        """Copy columns `source` of `rows` (None: of the only row) to the columns `target`."""
        for states in (self.keys, self.values):
            assert states is not None
            source = source.to(states.device)
            if rows is None:
                states[:, :, target] = states.index_select(2, source)
            else:
                states[rows, :, target] = states[rows, :, source]

    def load(self, keys: Float[Tensor, "B h S d"], values: Float[Tensor, "B h S e"], columns: int) -> None:
        """Take over the last states of a text of `columns` tokens; of the earlier ones no window has any use."""
        self.lazy_initialization(keys, values)
        self.grow(max(columns, self.extent.capacity))
        assert self.keys is not None
        assert self.values is not None
        first = columns - keys.shape[2]
        self.keys[:, :, first:columns] = keys
        self.values[:, :, first:columns] = values

    def text(self) -> tuple[Tensor, Tensor]:
        """The columns before `extent.start`."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.extent.start], self.values[:, :, : self.extent.start]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.extent.start + query_length, 0

    def get_seq_length(self) -> int:
        return self.extent.start

    def get_max_length(self) -> int:
        return -1


class DraftCache(Cache):
    """The cache of a target while drafts are verified; one for a generate call.

    Args:
        capacity: Columns to allocate at once (0: as needed).

    Attributes:
        asked: Which of `is_sliding` the model's masks were made for, wherever transformers made them.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.extent = Extent(capacity)
        self.lengths: list[int] = []
        self.asked: set[bool] = set()
        super().__init__(layer_class_to_replicate=lambda: DraftLayer(self.extent))  # pyright: ignore[reportArgumentType]  # called like a class

    @property
    def is_sliding(self) -> list[bool]:
        """One entry for each kind of mask. No layer drops anything; but a mask is made for the first layer of its kind,
        whose number then tells which kind the model asks for."""
        return [False, True]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The columns that a mask is for, and the first of them: the same for all layers."""
        self.asked.add(layer_idx > 0)
        return self.extent.start + query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.extent.start

    @property
    def written(self) -> list[DraftLayer]:
        """The layers that hold something; some families have layers that share others' states."""
        return [layer for layer in self.layers if isinstance(layer, DraftLayer) and layer.is_initialized]

    def append(self, rows: int, columns: int) -> None:
        """The last pass's columns are part of every row's text (a prompt)."""
        self.extent.start += columns
        self.lengths = [self.extent.start] * rows

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Of the last pass's columns each row's text goes on with these (rising numbers)."""
        start, lengths = self.extent.start, self.lengths
        if len(kept) == 1:
            columns = list(kept[0])
            if columns != list(range(len(columns))):
                source = torch.tensor(columns, device="cpu") + start
                for layer in self.written:
                    layer.move(None, source, slice(start, start + len(columns)))
        else:
            moves = [
                (row, start + column, lengths[row] + at)
                for row, columns in enumerate(kept)
                for at, column in enumerate(columns)
                if start + column != lengths[row] + at
            ]
            if moves:
                rows, source, target = torch.tensor(moves, device="cpu").unbind(1)
                for layer in self.written:
                    layer.move(rows, source, target)
        self.lengths = [length + len(columns) for length, columns in zip(lengths, kept, strict=True)]
        self.extent.start = max(self.lengths)

    def copy_from(self, cache: Cache, rows: int) -> None:
        """Begin with the text that another cache holds (see `check_readable`)."""
        columns = int(cache.get_seq_length())
        for layer in cache.layers:
            mine = DraftLayer(self.extent)
            self.layers.append(mine)
            # some families have layers that share others' states
            if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
                assert layer.keys is not None
                assert layer.values is not None
                held = min(columns, layer.keys.shape[2])
                mine.load(layer.keys[:, :, :held], layer.values[:, :, :held], columns)
        self.append(rows, columns)

    def copy_to(self, cache: Cache, columns: int | None = None) -> None:
        """Put the text's keys and values, or those of its first columns, into a cache of any kind that is empty or
        holds the text's beginning."""
        for i, layer in enumerate(self.layers):
            if layer in self.written:
                assert isinstance(layer, DraftLayer)
                held = int(cache.get_seq_length(i))
                keys, values = layer.text()
                cache.update(keys[:, :, held:columns], values[:, :, held:columns], i)


def drops_windows(cache: Cache | None) -> bool:
    """Whether a cache of plain decoding forgets what lies behind a sliding window."""
    return cache is not None and any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def check_readable(cache: Cache) -> None:
    """Raise `ZerodraftError` unless decoding can begin with what a cache holds and hand the whole text back to it."""
    # other layers than these mixins' hold no text
    kinds = {type(layer) for layer in cache.layers if isinstance(layer, CacheLayerMixin)}
    foreign = sorted(kind.__name__ for kind in kinds if kind not in READABLE)
    if foreign or (cache.offloading and int(cache.get_seq_length())):
        what = f"layers of kind {', '.join(foreign)}" if foreign else "layers that are offloaded"
        raise ZerodraftError(
            f"The given cache is a {type(cache).__name__} with {what}, which drafts cannot be verified over; give a "
            "DynamicCache or a StaticCache, or none."
        )
