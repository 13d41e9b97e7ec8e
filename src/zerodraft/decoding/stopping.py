"""When a text ends: transformers' stopping criteria, asked after every token of a step as plain decoding asks them.

What comes after the first token at which they say stop is dropped. The usual ones (EOS, length) are answered from the
ids at once. Time is looked at once a step, so a call may take one step longer than `max_time`. Criteria that are not
known here may remember what they were called with, and are called as in plain decoding (see `instep.py`).
"""

from jaxtyping import Int
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

from zerodraft.decoding.text import Text


class Stopping:
    """The criteria of one call.

    Args:
        criteria: What `generate` prepared.

    Attributes:
        max_length: Length of the longest allowed text.
        eos_ids: Tokens that end a text.
        pads: Whether a row that ended is filled up with padding; without an EOS criterion transformers lets it go on
            until all rows have ended.
        may_remember: Whether a criterion is not known to be a function of a row's text.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self._criteria = criteria
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
        self.may_remember = any(type(criterion) is not StopStringCriteria for criterion in self._others)

    def __call__(self, token: int, text: Text) -> bool:
        """Whether a row's text, which now ends with `token`, is finished."""
        if token in self.eos_ids or (self.max_length is not None and text.length >= self.max_length):
            return True
        return any(bool(criterion(text.ids(), None)[0]) for criterion in self._others)

    def together(self, ids: Int[Tensor, "B T"], scores: tuple[Tensor, ...] | None) -> list[bool]:
        """Whether each row's text is finished, from one call for all of them as plain decoding makes it."""
        return self._criteria(ids, scores).tolist()  # pyright: ignore[reportArgumentType]  # None is what generate gives

    def time_is_up(self, text: Text) -> bool:
        """Whether the call has taken its time."""
        return any(bool(criterion(text.ids(), None)[0]) for criterion in self._times)
