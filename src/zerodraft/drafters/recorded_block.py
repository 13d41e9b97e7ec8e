"""A draft of the block drafter in a form that can be recorded once and replayed, as CUDA graphs are.

On a GPU Python takes longer to launch a draft's hundred kernels than they take. Their shapes depend on nothing but the
number of new states and the size of the cache. So states are padded to one of two sizes, what varies beside them (where
the text ends, how many states are real, the newest token) lies in tensors that stay where they are, attention runs over
the whole cache under a mask, all slots are drafted whatever is wanted, and one tensor of bytes holds what comes out.
Keys and values of states that fill up go behind the slots, where nobody looks and later ones take their place.

As in `fast/recorded.py`, running a draft once more (to warm up, say) does no harm, and what was recorded is void when
the cache grows.

Legend: M new context positions, F tapped states, K slots, H hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.drafters.block_layers import EachLayer, hidden_from
from zerodraft.drafters.block_model import BlockDrafterModel
from zerodraft.drafters.tapped import one_piece, unpacked
from zerodraft.fast.modules import VARYING_ROPE
from zerodraft.fast.recorded import Recorder, Run

SIZES = (8, 32)
"""States that are read in one recorded draft. There are few, as a GPU takes hardly longer over some rows more; behind
more states, as behind a prompt, a draft is not recorded."""

Draft = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, ...]]
"""A draft's tensors by the first tap of the last position (H,), the newest token (1,) and what runs the layers."""


def can_be_recorded(model: BlockDrafterModel, layers: Any) -> bool:
    """Whether all drafts of a network launch the same whatever the numbers are."""
    rotary: Any = model.rotary
    autocast = torch.is_autocast_enabled(model.norm.weight.device.type)
    return isinstance(layers, EachLayer) and rotary.rope_type not in VARYING_ROPE and not autocast


def recorded_size(new: int) -> int | None:
    """How many states a recorded draft behind `new` ones reads; None: it is not recorded."""
    return next((size for size in SIZES if new <= size), None)


class RecordedDrafts:
    """The buffers and recorded drafts of a drafter, for one row of text at a time.

    Args:
        recorder: Makes what records drafts on a device.
        mark: What has to be the same for the recorded drafts to be the drafter's.
        cache: Zeros, (F, 2, key/value heads, positions, head size).
        hidden: H.
    """

    def __init__(
        self, recorder: Callable[[torch.device], Recorder], mark: tuple[Any, ...], cache: Tensor, hidden: int
    ) -> None:
        self.mark = mark
        self._recorder, self._cache = recorder, cache
        self._record: Recorder = recorder(cache.device)
        self._taps = cache.new_zeros(SIZES[-1], len(cache), hidden)
        self._start, self._new, self._newest = torch.zeros(3, 1, dtype=torch.int64, device=cache.device)
        self._runs: dict[int, Run] = {}

    @torch.inference_mode()
    def begin(self) -> Tensor:
        """The cache without its last text, of which nothing is left, not even a NaN behind a mask."""
        self._taps.zero_()
        return self._cache.zero_()

    def draft(
        self,
        compute: Draft,
        layers: EachLayer,
        cache: Float[Tensor, "F 2 nk S D"],
        start: int,
        taps: Float[Tensor, "M F H"],
        newest: Int[Tensor, "1"],
    ) -> list[np.ndarray]:
        """What `compute` gives, for all slots.

        Args:
            compute: The draft.
            layers: Its layers.
            cache: With room for `recorded_size(M)` states and the slots from `start` on.
            start: The first position of the new states.
            taps: These states, at most as many as the largest of `SIZES`.
            newest: The token behind them.

        Raises:
            RecordingError: it cannot be recorded.
        """
        if cache is not self._cache:
            self._cache = cache
            self._runs.clear()
            # a CUDA memory pool whose graphs are all gone takes no new ones
            self._record = self._recorder(cache.device)
        new = len(taps)
        size = recorded_size(new)
        assert size is not None
        self._taps[:new] = taps
        self._start.fill_(start)
        self._new.fill_(new)
        self._newest.copy_(newest)
        if size not in self._runs:
            self._runs[size] = self._record(partial(self._compute, compute, layers, size))
        piece, *like = self._runs[size]()
        return unpacked(piece, like)

    def _compute(self, compute: Draft, layers: EachLayer, size: int) -> tuple[Tensor, ...]:
        """What is recorded: no Python value in here may change from one run to the next."""
        taps, start, new = self._taps[:size], self._start, self._new

        def through(x: Float[Tensor, "K H"]) -> Float[Tensor, "K H"]:
            place, slot = (torch.arange(n, device=x.device) for n in (size, len(x)))
            known = start + new
            # what fills up stands behind the slots
            columns = torch.cat([start + place + len(x) * (place >= new), known + slot])
            return layers.run(taps, x, self._cache, columns, hidden_from(known + len(x), self._cache.shape[-2], x))

        found = compute(taps.index_select(0, new - 1)[0, 0], self._newest, through)
        return one_piece(found), *found
