"""The clocks around a decoding loop, and who learns from them: statistics, draft lengths and the fallback.

What they decide changes how fast a text comes, never what it is; the loop (`engine.py`) only says what begins and ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from zerodraft.decoding.fallback import UNLIMITED, Fallback
from zerodraft.decoding.lengths import DraftLength
from zerodraft.decoding.stats import DecodeStats, Step


class Watch:
    """Times the steps of one call, in the order of its methods.

    Args:
        stats: Get the seconds of each phase, and counts.
        length: Gets what drafts and passes cost.
        fallback: Decides whether to draft at all, and gets what steps took and brought; None: every step drafts.
        device: Of the target.
    """

    def __init__(
        self, stats: DecodeStats, length: DraftLength, fallback: Fallback | None, device: torch.device
    ) -> None:
        self.stats, self.length, self.fallback = stats, length, fallback
        self._clock = fallback.timer(device) if fallback else perf_counter
        self._start = perf_counter()
        self._began: float | None = None
        self._drafted: float | None = None
        if fallback:
            fallback.begin()

    def begin(self) -> None:
        """A step begins."""
        watching = self.fallback is not None and self.fallback.watching
        self._began = self._clock() if watching else None

    def longest(self) -> int:
        """The most positions to draft in it; 0 for a plain step."""
        return self.fallback.longest() if self.fallback else UNLIMITED

    @contextmanager
    def drafting(self, positions: int) -> Iterator[None]:
        """Around the drafter's pass over so many positions."""
        began = self._clock()
        with self.stats.timed("draft"):
            yield
        self.length.observe_cost("draft", positions, self._clock() - began)

    def drafted(self, positions: int) -> None:
        """The drafts are there; 0: none was asked for. What follows is the target's part."""
        # a rest is to cost nothing, and its steps say nothing new
        timed = positions > 0 or self.fallback is None or not self.fallback.resting
        self._drafted = self._clock() if timed else None

    def verified(self, positions: int, nodes: int) -> None:
        """The target has scored a draft of so many positions and nodes, and keeps what it accepted."""
        if self._drafted is not None:
            seconds = self._clock() - self._drafted
            self.length.observe_cost("verify", positions, seconds)
            self.length.observe_cost("score", nodes, seconds)

    def count(self, step: Step, depths: list[int], *, draft: bool) -> None:
        """A step, or the prompt's pass, is over but for what is learnt of it; `depths` as in `DecodeStats.count`."""
        self.stats.count(step, depths, draft=draft)
        self.stats.total_seconds = perf_counter() - self._start

    def learn(self, step: Step, positions: int, unread: int) -> None:
        """What a step that drafted so many positions took and brought; `unread` as `read` in `Fallback.learn`."""
        self.stats.plain_steps += not positions
        if self.fallback is None:
            return
        brought = [len(row.tokens) for row in step.rows if row is not None]
        taken = None if self._began is None else self._clock() - self._began
        self.fallback.learn(positions, sum(brought) / len(brought), taken, unread)
        if positions and self.fallback.resting:
            self.stats.fallback = self.fallback.why()
