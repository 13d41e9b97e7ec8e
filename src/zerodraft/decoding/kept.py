"""What one text leaves for the next that begins like it, as the turns of a conversation do: keys and values, and the
drafter's session. Both go back to where the two texts part, and only what follows is read. Several conversations at
once keep a state each, the least recently used of which is given up where memory ends."""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from zerodraft.decoding.protocols import Drafter, DraftSession, LastingTarget, Target


@dataclass(frozen=True, slots=True)
class Origin:
    """What has to be the same for keys, values and drafts to be of use again: the model, its weights, the drafter."""

    model: Any
    drafter: Drafter
    weights: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: Any, drafter: Drafter) -> "Origin":
        """As they are now."""
        return cls(model, drafter, versions((*model.parameters(), *model.buffers())))

    def is_same(self, other: "Origin") -> bool:
        """Whether nothing has changed between the two."""
        return self.model is other.model and self.drafter is other.drafter and self.weights == other.weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The state behind a text of one row.

    Attributes:
        tokens: The text but for its last token, which was never in the target.
        target: Has cached these.
        session: Was told these and perhaps more.
        origin: What they come from.
    """

    tokens: Int[Tensor, " n"]
    target: LastingTarget
    session: DraftSession
    origin: Origin

    def for_text(self, ids: Int[Tensor, " T"], fresh: Target, origin: Origin) -> "Kept | None":
        """The same for a prompt with these ids: cut down to the tokens that both begin with, at most all but the last
        one of the prompt. None where nothing of it can be used.

        Args:
            ids: The whole prompt.
            fresh: What would read it otherwise.
            origin: Of model and drafter as they are now.
        """
        if not self.origin.is_same(origin) or not isinstance(fresh, LastingTarget):
            return None
        same = common_prefix(self.tokens, ids[:-1])
        if not same or not fresh.goes_on_from(self.target):
            return None
        self.target.crop([same])
        self.session.rewind(0, same)
        return Kept(tokens=ids[:same], target=self.target, session=self.session, origin=self.origin)


class KeptTexts:
    """What the last texts have left, the least recently used first. Threads may share it: whoever takes a state has it
    alone, and puts back what the text comes to.

    Args:
        mib: How much memory the targets' keys and values may take while nobody uses them, in MiB.
        texts: How many texts are kept at most.
    """

    def __init__(self, *, mib: float = math.inf, texts: float = math.inf) -> None:
        self.mib, self.texts = mib, texts
        self._kept: list[Kept] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        # a copy, or another process, begins with no texts: what is kept belongs to one model's memory
        return {"mib": self.mib, "texts": self.texts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept at present."""
        return sum(kept.target.nbytes for kept in self._kept)

    def take(self, ids: Int[Tensor, " T"], fresh: Target, origin: Origin) -> Kept | None:
        """The state of the text that has most in common with a prompt, cut down to that (see `Kept.for_text`). A text
        that would lose more by it than the prompt gains stays whole, unless the next one takes its place anyway."""
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.origin.is_same(origin)]
            best = max(self._kept, key=lambda kept: common_prefix(kept.tokens, ids), default=None)
            if best is None or (self.texts > 1 and 2 * common_prefix(best.tokens, ids) < len(best.tokens)):
                return None
            self._kept = [kept for kept in self._kept if kept is not best]
        return best.for_text(ids, fresh, origin)

    def put(self, left: Kept) -> None:
        """Keep what a text has left; what it goes beyond is of no more use."""
        with self._lock:
            others = [kept for kept in self._kept if common_prefix(kept.tokens, left.tokens) < len(kept.tokens)]
            self._kept = [*others, left]
            while self._kept and (len(self._kept) > self.texts or self.nbytes > self.mib * 2**20):
                del self._kept[0]

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept = []


def common_prefix(a: Int[Tensor, " n"], b: Int[Tensor, " m"]) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(a), len(b))
    return int((a[:length] == b[:length]).long().cumprod(0).sum())


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Where tensors are and how often they were changed; an edit through `.data` counts for none."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
