"""Plain steps while drafts do not pay: an account of the time that they cost and bring.

Whether drafts pay depends on the target, the drafter, the machine and the text, so it is measured: the clock runs over
whole steps (catching up, drafting, search, the target's pass, processors, bookkeeping), whatever they are made of. Time
is counted in plain steps' time per token. A step with a draft that takes 1.5 of these and brings 2 tokens earns 0.5.
Drafts may lose the allowance, and then a small share of the time of plain steps; what they earn is theirs to lose, up
to a limit. So they cost at most a few percent of a few hundred tokens, however bad they are, and a drafter that was
unlucky is soon tried again.

Which steps are plain changes how fast a text comes, never what it is (see `verify`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from zerodraft.common.errors import ZerodraftError

T = TypeVar("T")

FIRST_PLAIN = 2
"""Plain steps before the first draft: without them there is nothing to compare with."""
REST = 8
"""Plain steps before the first new try; each further one in a row waits twice as long."""
LONGEST_REST = 512
SHORT_REST, CHEAP = 32, 1.2
"""The longest where a step with a draft takes less time than this many plain ones."""
TRY = 4
"""Positions of the first draft after a rest: enough to see whether anything has changed."""
READ = 64
"""Tokens that a drafter reads in about the time of one draft. What it read in a step, the prompt above all, it reads
once, and says nothing of drafts to come."""
RECENT = 9
"""Steps of either kind that say what one takes at present."""
BUSY = 1.5
"""A step counts for at most this many times the recent ones: whatever else it did has nothing to do with drafts."""
UNLIMITED = 1 << 30


@dataclass(kw_only=True, slots=True)
class Fallback:
    """Decides step by step whether to draft at all; or, where its plain steps have copies, whether to ask a model for
    drafts beside them. It is told what steps took, so that made-up times can drive it.

    The first drafts are short ones: while nothing is known, a draft of one position is all that is risked, and then as
    many as the account could pay for if the time grew with the length.

    Attributes:
        allowance: What drafts may lose before they have earned anything, in plain steps.
        share: What they may lose after that, as a share of the plain steps made.
        credit: The most that is kept of what they earned, in plain steps. The next text begins with the allowance.
    """

    allowance: float = 4.0
    share: float = 0.0125
    credit: float = 8.0
    _plain: tuple[float, ...] = field(default=(), init=False)
    _plain_tokens: tuple[float, ...] = field(default=(), init=False)
    _seconds: tuple[tuple[float, float], ...] = field(default=(), init=False)
    _brought: tuple[float, ...] = field(default=(), init=False)
    _lengths: tuple[float, ...] = field(default=(), init=False)
    _needed: float = field(default=0.0, init=False)
    """What the account must have for a draft."""
    _balance: float = field(init=False)
    _position: float = field(default=0.0, init=False)
    _longest: int = field(default=1, init=False)
    _tries: int = field(default=0, init=False)
    _rest: int = field(default=0, init=False)
    _lost: int = field(default=0, init=False)
    """Texts in a row that ended without drafts."""
    _tried: bool = field(default=False, init=False)
    """Whether this text, or those before it whose rest goes on, had a draft."""

    def __post_init__(self) -> None:
        for name in ("allowance", "share", "credit"):
            if not getattr(self, name) >= 0:
                raise ZerodraftError(f"{name}={getattr(self, name)} is out of range; give 0 or more.")
        self._balance = self.allowance

    def begin(self) -> None:
        """A new text, in which drafts may do better or worse than in the last."""
        # where they did not pay in the last ones either, less is staked, and later
        lost = self.resting
        if lost and not self._tried:
            # texts may all be shorter than a rest: what the last one waited counts
            return
        self._tried = False
        self._balance = self.allowance / 2 if lost else self.allowance
        self._tries, self._rest = 0, min(REST << self._lost, LONGEST_REST) if lost else 0
        self._lost = min(self._lost + 1, 16) if lost else 0

    @property
    def resting(self) -> bool:
        """Whether drafts have not paid lately."""
        return self._rest > 0 or self._balance < min(self._needed, self.allowance)

    @property
    def watching(self) -> bool:
        """Whether the time of the next step is of interest; not so before the last steps of a rest."""
        return self._rest <= RECENT

    def longest(self) -> int:
        """The most positions to draft in the next step; 0 for a plain one."""
        return 0 if self.resting or len(self._plain) < FIRST_PLAIN else max(1, min(self._longest, self._affordable()))

    def learn(self, k: int, tokens: float, seconds: float | None, read: float = 0) -> None:
        """Take note of a step that drafted k positions (0: none) and brought `tokens` to a row; before that the drafter
        had to `read` tokens that it did not know yet. The time of a step that nobody watched is None."""
        if k == 0:
            if seconds is not None:
                self._plain = _recent(self._plain, seconds)
                self._plain_tokens = _recent(self._plain_tokens, tokens)
            self._rest = max(self._rest - 1, 0)
            enough = min(max(self._needed, 0.0) + 0.5, self.allowance)
            self._balance = max(self._balance, min(self._balance + self.share, enough))
            return
        if seconds is None:
            # another thread has made drafts rest meanwhile
            return
        self._tried = True
        self._brought = _recent(self._brought, tokens)
        self._lengths = _recent(self._lengths, k)
        # last: where there is none, other threads look at nothing else
        self._seconds = _recent(self._seconds, (seconds, read))
        taken = self._taken()
        more = taken[-1] - 1
        if len(taken) > 1:
            # a longer draft than the recent ones may take longer
            grown = max(1.0, k / _median(self._lengths))
            more = min(more, BUSY * _median(taken) * grown - 1)
        typical = _median(taken)
        # for the next draft: what the recent ones lost, and, but for one plain step, what one loses that brings nothing
        self._needed = max(typical - sum(self._brought) / len(self._brought), typical - 2)
        earned = tokens - 1 - more
        self._balance = min(self._balance + earned, self.credit)
        self._position = more / k
        self._longest = max(self._longest, self._affordable())
        # whatever the clock says: it may be wrong about what a plain step takes
        useless = len(self._brought) == RECENT and sum(self._brought) == RECENT
        if earned > 0 and self._balance >= 1:
            self._tries = 0
        elif self.resting or useless:
            limit = SHORT_REST if typical < CHEAP else LONGEST_REST
            self._rest, self._longest = min(REST << self._tries, limit), TRY
            self._tries = min(self._tries + 1, 16)

    def why(self) -> str:
        """What drafts have lately cost and brought, in words."""
        if not self._seconds:
            return ""
        taken, brought = (sum(of) / len(of) for of in (self._taken(), self._brought))
        return f"a step with a draft takes as long as {taken:.2f} plain ones and brings {brought:.2f} tokens"

    def _taken(self) -> list[float]:
        """What the recent drafts took, in the time of a plain step's token as it is known by now. Plain steps that copy
        bring several tokens; a few of them tell little, so one that brought a single token is added."""
        per_token = (1 + sum(self._plain_tokens)) / (1 + len(self._plain_tokens))
        unit = _median(self._plain) / per_token if self._plain else self._seconds[0][0]
        # never less than a plain step: those that were timed were slow by chance then
        return [1 + max(seconds / unit - 1, 0.0) / (1 + read / READ) for seconds, read in self._seconds]

    def _affordable(self) -> int:
        """Positions whose draft the account can pay for even if it brings nothing, as far as the last draft tells."""
        least = max(self._balance, 0.0) / UNLIMITED
        return int(self._balance / self._position) if self._position > least else UNLIMITED


def _recent(values: tuple[T, ...], new: T) -> tuple[T, ...]:
    """The last few with one more: tuples, since threads that share a decoder read while another one learns."""
    return (*values, new)[-RECENT:]


def _median(values: Iterable[float]) -> float:
    ranked = sorted(values)
    return ranked[(len(ranked) - 1) // 2]
