"""Views over a transformers `Cache` that give every (cycle, layer) its own KV slot.

A layer writes to its cache, `update(k, v, layer_idx)`, with its stored index; `SlotView` sends that to the slot of
the execution, whatever kind of cache is behind it. For early exit `KvMemory` keeps the keys and values of *all* tokens
of the forward pass by layer, so that a compacted step still writes and attends to every token: those of an exited token
come from its frozen state (the same in all remaining cycles, as the weights are shared) or from its latest cycle.
"""

from typing import Any

from torch import Tensor
from transformers import Cache

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.interface import TokenGrid

KeysValues = tuple[Tensor, Tensor]


class KvMemory:
    """Keys and values of every token of this forward pass, by stored layer; shapes `(b, kv, t, d)`."""

    def __init__(self) -> None:
        self._kept: dict[int, KeysValues] = {}

    def __getitem__(self, layer: int) -> KeysValues:
        return self._kept[layer]

    def merge(self, layer: int, keys: Tensor, values: Tensor, grid: TokenGrid | None) -> KeysValues:
        """Put the states of the tokens of `grid` (`(1, kv, n, d)`; None: all tokens) in place; returns all tokens'."""
        if grid is not None:
            old = self._kept[layer]
            keys, values = (
                grid.unpack(new.transpose(1, 2), into=kept.transpose(1, 2)).transpose(1, 2)
                for new, kept in zip((keys, values), old, strict=True)
            )
        self._kept[layer] = keys, values
        return keys, values

    def select(self, layer: int, keys: Tensor, values: Tensor, running: Tensor) -> KeysValues:
        """All tokens' states where only those of `running` `(b, t)` are new (the oracle of the `latest` policy)."""
        if layer in self._kept:
            keep = running[:, None, :, None]
            keys, values = (new.where(keep, old) for new, old in zip((keys, values), self._kept[layer], strict=True))
        self._kept[layer] = keys, values
        return keys, values


class NoSlotError(ZerodraftError, AttributeError):
    """Something is asked of a cache that it has no slots for; an `AttributeError` for those who ask whether it has."""


class SlotView:
    """What a layer gets as its cache for one execution.

    Args:
        cache: The cache of the whole unrolled model, or None.
        slot: Index of this execution in it.
        memory: Keeps all tokens' states by layer (early exit), or None.
        grid: Tokens that this execution has, if not all.
        running: `(b, t)`, tokens whose states are taken over; the others keep those in `memory`.
    """

    def __init__(
        self,
        cache: Cache | None,
        slot: int,
        memory: KvMemory | None = None,
        grid: TokenGrid | None = None,
        running: Tensor | None = None,
    ) -> None:
        self.cache, self.slot, self.memory, self.grid, self.running = cache, slot, memory, grid, running

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> KeysValues:
        if self.memory is not None and self.running is not None:
            keys, values = self.memory.select(layer_idx, keys, values, self.running)
        elif self.memory is not None:
            keys, values = self.memory.merge(layer_idx, keys, values, self.grid)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, self.slot, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(self.slot)

    def __getattr__(self, name: str) -> Any:
        # Sparse attention keeps an index, linear attention a state: nothing that an execution has a slot for.
        raise NoSlotError(
            f"A layer asks its cache for {name!r}; only layers that keep keys and values, nothing else, can be cycled."
        )


class KvReady(Exception):
    """Carries a layer's keys and values out of it, before its attention and FFN are paid for."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.states = keys, values


class KvProbe:
    """A cache that ends the layer's execution at the moment the layer would write to it."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> KeysValues:
        raise KvReady(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
