"""A model's forward pass over a draft in a form that can be recorded once and replayed, as CUDA graphs are.

A replay launches the same kernels on the same addresses again. So all that a pass reads lies in tensors that stay
where they are: the keys and values of the whole text in buffers with room ahead, the draft's tokens, depths and who
sees whom, and the column at which the text ends. Drafts are padded to powers of two, a recorded pass for each. A pass
writes nothing but the columns behind the text, so that running it once more (to warm up, say) does no harm.

transformers' own `StaticCache` cannot be used for this: its layers move their end with every pass, and its sliding
windows forget what a rejected draft has to bring back. Here every layer holds the whole text, as in `fast.cache`.

Legend: T tokens of a pass, padded; S columns of the buffers.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from zerodraft.fast.cache import DraftCache
from zerodraft.fast.target import FULL, SLIDING, attention_kinds
from zerodraft.models.caches import argument_of

FIRST_ROOM = 512
"""Columns of the first buffers; they double when the text needs more."""

AHEAD = (1, 2, 4, 8, 16, 32)
"""Sizes recorded before the first pass, so that the time of hardly any later one includes a recording."""

Run = Callable[[], Any]
Recorder = Callable[[Run], Run]
"""Takes a function without arguments and returns one that does the same, perhaps with its results in the same tensors
every time."""


class RecordingError(RuntimeError):
    """A pass could not be recorded."""


@dataclass(slots=True)
class Pass:
    """A recorded pass: what it reads besides text and weights, how to run it, and how to put the columns that it wrote
    in another order."""

    ids: Int[Tensor, "1 T"]
    depth: Int[Tensor, "1 T"]
    visible: Bool[Tensor, "1 T T"]
    columns: Int[Tensor, " T"]
    order: Int[Tensor, " T"]
    run: Run = field(init=False)
    reorder: Run = field(init=False)


class Recording:
    """The buffers and recorded passes of a model, for one row of text at a time.

    Args:
        model: Referred to weakly.
        recorder: Makes what records passes on a device.
        mark: What has to be the same for the recorded passes to be the model's.
    """

    def __init__(
        self, model: PreTrainedModel, recorder: Callable[[torch.device], Recorder], mark: tuple[Any, ...] = ()
    ) -> None:
        self.mark = mark
        self.cache = DraftCache()
        self._model = weakref.ref(model)
        self._config: Any = model.config.get_text_config(decoder=True)
        self._recorder = recorder
        self._record: Recorder = recorder(model.device)
        self._start = torch.zeros((), dtype=torch.int64, device=model.device)
        self._passes: dict[tuple[int, tuple[int, ...]], Pass] = {}
        self._last: Pass | None = None
        self._room = 0
        self._keys: Tensor | None = None

    def begin(self) -> DraftCache:
        """The cache without its last text, of which nothing is left, not even a NaN behind a mask."""
        for states in self._states():
            states.zero_()
        self.cache.extent.start, self.cache.lengths = 0, []
        return self.cache

    def score(
        self, ids: Int[Tensor, "1 t"], depth: Int[Tensor, "1 t"], visible: Bool[Tensor, "1 t t"], taps: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (1, T, V) and tapped states of a pass over these tokens and some that fill up; good until the next."""
        start, count = self.cache.extent.start, ids.shape[1]
        size = padded(count)
        self._make_room(start + max(size, *AHEAD))
        self._start.fill_(start)
        for other in AHEAD:
            self._pass(other, taps)
        # one of this size with other taps still has the columns of its own last run
        self._last = step = self._pass(size, taps)
        # tokens that fill up see the text and themselves, so that their scores are numbers; nobody sees them
        step.ids.zero_()[:, :count] = ids
        step.depth.zero_()[:, :count] = depth
        step.visible.copy_(torch.eye(size, dtype=torch.bool, device=ids.device))[:, :count, :count] = visible
        return step.run()

    def put_first(self, columns: Sequence[int]) -> None:
        """Put these columns of the last pass in front of its others."""
        if list(columns) == list(range(len(columns))):
            return
        step = self._last
        assert step is not None
        step.order.copy_(torch.tensor([*columns, *range(len(columns), len(step.order))], device="cpu"))
        step.reorder()

    def _states(self) -> list[Tensor]:
        return [states for layer in self.cache.written for states in (layer.keys, layer.values) if states is not None]

    def _make_room(self, needed: int) -> None:
        """Buffers of a power of two columns, at least `needed`. Passes recorded with other buffers are void."""
        if needed <= self._room and self._states()[0] is self._keys:
            return
        self._room = max(self._room, FIRST_ROOM, padded(needed))
        for layer in self.cache.written:
            layer.grow(self._room)
        self._keys = self._states()[0]
        if self._passes:
            self._passes.clear()
            # a CUDA memory pool whose graphs are all gone takes no new ones
            self._record = self._recorder(self._start.device)

    def _pass(self, size: int, taps: tuple[int, ...]) -> Pass:
        if (size, taps) not in self._passes:
            device = self._start.device
            step = Pass(
                ids=torch.zeros(1, size, dtype=torch.int64, device=device),
                depth=torch.zeros(1, size, dtype=torch.int64, device=device),
                visible=torch.eye(size, dtype=torch.bool, device=device)[None],
                columns=torch.zeros(size, dtype=torch.int64, device=device),
                order=torch.arange(size, device=device),
            )
            layers: Any = [TextLayer(layer, self._room, self._start, step.columns) for layer in self.cache.layers]
            step.run = self._record(partial(self._forward, step, Cache(layers=layers), taps))
            step.reorder = self._record(partial(self._reorder, step))
            self._passes[size, taps] = step
        return self._passes[size, taps]

    # -- what is recorded: no Python value in here may change from one run to the next --------------------------------

    def _forward(self, step: Pass, cache: Cache, taps: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        model = self._model()
        assert model is not None
        step.columns.copy_(self._start + torch.arange(len(step.columns), device=self._start.device))
        positions = self._start + step.depth
        out = model(
            input_ids=step.ids,
            attention_mask=self._masks(step, positions[0]),
            position_ids=positions,
            use_cache=True,
            output_hidden_states=bool(taps),
            return_dict=True,
            **{argument_of(model): cache},
        )
        return out.logits, torch.stack([out.hidden_states[i] for i in taps], 2) if taps else None

    def _masks(self, step: Pass, positions: Int[Tensor, " T"]) -> Any:
        """What is added to the scores, (1, 1, T, S), or one such for each kind of layer: `HfTarget.masks`, but over the
        whole buffers, and added for every attention implementation, so that none converts it once a layer."""
        kinds, window = attention_kinds(self._config)
        places = torch.arange(self._room, device=positions.device)
        full = (places < self._start).expand(len(positions), -1).index_copy(1, step.columns, step.visible[0])
        made = {FULL: full}
        if SLIDING in kinds:
            places = places.index_copy(0, step.columns, positions)
            made[SLIDING] = full & (positions[:, None] - places < window)
        assert self._keys is not None
        dtype = self._keys.dtype
        added = {
            kind: torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)[None, None]
            for kind, mask in made.items()
        }
        if getattr(self._config, "layer_types", None) is None:
            return added[kinds[0]]
        return {kind: added[kind] for kind in kinds}

    def _reorder(self, step: Pass) -> None:
        taken = self._start + step.order
        for states in self._states():
            states.index_copy_(2, step.columns, states.index_select(2, taken))


class TextLayer(StaticLayer):
    """A static layer over the buffers of a `DraftLayer` that writes a pass's states to given columns, every time."""

    def __init__(self, layer: Any, room: int, end: Int[Tensor, ""], columns: Int[Tensor, " T"]) -> None:
        super().__init__(room)
        self.keys, self.values, self.columns = layer.keys, layer.values, columns
        self.cumulative_length = end
        self.is_initialized = layer.is_initialized

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write to the columns; returns the whole buffers."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.columns, key_states)
        self.values.index_copy_(2, self.columns, value_states)
        return self.keys, self.values


def padded(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
