"""When a text ends: transformers' stopping criteria, asked after every token of a step as plain decoding asks them.

What comes after the first token at which they say stop is dropped. The usual ones (EOS, length) are answered from the
ids at once. Time is looked at once a step, so a call may take one step longer than `max_time`.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList


@runtime_checkable
class Growing(Protocol):
    """A row's text. Its ids are asked for by the criteria that read them alone."""

    length: int

    def ids(self) -> Int[Tensor, "1 T"]:
        """All of them."""
        ...


class Stopping:
    """The criteria of one call.

    Args:
        criteria: What `generate` prepared.
        rows: Rows of the batch.

    Attributes:
        max_length: Length of the longest allowed text.
        eos_ids: Tokens that end a text.
        pads: Whether a row that ended is filled up with padding; without an EOS criterion transformers lets it go on
            until all rows have ended.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: int) -> None:
        self._rows = rows
        self.max_length: int | None = None
        self.eos_ids: frozenset[int] = frozenset()
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)
        self._times, self._others = [], []
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos_ids |= {int(i) for i in criterion.eos_token_id.flatten().tolist()}
            elif type(criterion) is MaxLengthCriteria:
                shortest = criterion.max_length if self.max_length is None else self.max_length
                self.max_length = min(criterion.max_length, shortest)
            elif type(criterion) is MaxTimeCriteria:
                self._times.append(criterion)
            else:
                self._others.append(criterion)

    def __call__(self, row: int, token: int, text: Growing, scores: Callable[[], Any]) -> bool:
        """Whether the row's text, which now ends with `token`, is finished."""
        stop = token in self.eos_ids or (self.max_length is not None and text.length >= self.max_length)
        if self._others:
            batch, so_far = text.ids().expand(self._rows, -1), scores()
            for criterion in self._others:
                said: Any = criterion(batch, so_far)
                stop |= bool(said[row] if isinstance(said, Tensor) and said.ndim else said)
        return stop

    def time_is_up(self, text: Growing) -> bool:
        """Whether the call has taken its time."""
        return any(bool(criterion(text.ids(), None)[0]) for criterion in self._times)
