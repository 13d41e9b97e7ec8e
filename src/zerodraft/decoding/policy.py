"""What a step does about drafts (nothing, copies alone, a draft of k positions, a tree of n nodes), by clocks around
the decoding loop.

The loop (`engine.py`) says what begins and ends. The policy asks its learners before a step and tells them after it:
`Fallback` whether to draft at all, another one whether to ask a model beside copies, `DraftLength` how much. What they
decide changes how fast a text comes, never what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from zerodraft.decoding.costs import Costs
from zerodraft.decoding.fallback import UNLIMITED, Fallback
from zerodraft.decoding.protocols import CopyingSession, DraftSession
from zerodraft.decoding.stats import DecodeStats, Step


class Policy:
    """Decides and times the steps of one call, in the order of its methods.

    Args:
        stats: Get the seconds of each phase, and counts.
        costs: What drafts and passes take; draft lengths read them.
        fallback: Whether to draft at all; None: in every step.
        beside: Whether to ask a model beside copies; its plain steps are those with copies alone.
        session: The drafter's.
        device: Of the target.
    """

    def __init__(
        self,
        stats: DecodeStats,
        costs: Costs,
        fallback: Fallback | None,
        beside: Fallback,
        session: DraftSession,
        device: torch.device,
    ) -> None:
        self.stats, self.costs, self.fallback, self.beside = stats, costs, fallback, beside
        self._copying = session if isinstance(session, CopyingSession) else None
        self._clock = costs.timer(device)
        self._start = perf_counter()
        self._began: float | None = None
        self._drafted: float | None = None
        # tokens of a row that the model beside copies has not read, as it was not asked since
        self._unread = (stats.prompt_tokens - stats.reused_tokens) / stats.rows
        for learner in (fallback, beside):
            if learner:
                learner.begin()

    def begin(self) -> int:
        """A step begins: the most positions to draft in it; 0 for a plain step."""
        self._began = self._clock() if self.fallback is None or self.fallback.watching else None
        if self._copying:
            self._copying.asked = None
            self._copying.longest = 0 if self.costs.trial("copies") else self.beside.longest()
        if self.fallback is None:
            return UNLIMITED
        return 0 if self.costs.trial("plain") else self.fallback.longest()

    @contextmanager
    def drafting(self, positions: int) -> Iterator[None]:
        """Around the drafter's pass over this many positions."""
        began = self._clock()
        with self.stats.timed("draft"):
            yield
        self.costs.observe("draft", positions, self._clock() - began)

    def drafted(self, positions: int) -> None:
        """The drafts are there; 0: none was asked for. What follows is the target's part."""
        # a rest is to cost nothing, and its steps say nothing new
        timed = positions > 0 or self.fallback is None or not self.fallback.resting
        self._drafted = self._clock() if timed else None

    def verified(self, positions: int, nodes: int) -> None:
        """The target has scored a draft of this many positions and nodes, and keeps what it accepted."""
        if self._drafted is not None:
            seconds = self._clock() - self._drafted
            self.costs.observe("verify", positions, seconds)
            self.costs.observe("score", nodes, seconds)
            self.costs.steps += 1

    def count(self, step: Step, depths: list[int], *, draft: bool) -> None:
        """A step, or the prompt's pass, is over but for what is learnt of it; `depths` as in `DecodeStats.count`."""
        self.stats.count(step, depths, draft=draft)
        self.stats.total_seconds = perf_counter() - self._start

    def learn(self, step: Step, positions: int, unread: int) -> None:
        """What a step that drafted this many positions took and brought; `unread` as `read` in `Fallback.learn`."""
        self.stats.plain_steps += not positions
        brought = [len(row.tokens) for row in step.rows if row is not None]
        tokens, asked = sum(brought) / len(brought), self._copying.asked if self._copying else None
        taken = None if self._began is None else self._clock() - self._began
        if asked is not None:
            self.beside.learn(asked, tokens, taken, self._unread)
        self._unread = tokens + (0 if asked else self._unread)
        if self.fallback is not None:
            self.fallback.learn(positions, tokens, taken, unread)
            if positions and self.fallback.resting:
                self.stats.fallback = self.fallback.why()
