"""One thread that decodes for all: it takes a step of one request, then of the next.

Requests share the model by turns; a step of the engine is the slice. Whoever is new gets the next turn, and a long
prompt is read in pieces of one turn each. Where more come than take turns with drafts, those to a looped model that
begin then share a batch over depth; there a slice is what brings any of them a token. Everything that touches the model
happens in this thread; others hand in jobs and are told what comes of them.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zerodraft.decoding.stats import DecodeStats, Step
from zerodraft.generate.decoder import own_plain
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.generate.over_depth import OverDepth
from zerodraft.serve.api import ApiError
from zerodraft.serve.metrics import Metrics
from zerodraft.serve.writer import Piece, Writer
from zerodraft.ztt.exits import ExitRule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """An answer is over.

    Attributes:
        reason: "stop", "length", "timeout", "shutdown", "cancelled" or "error".
        text: What was held back until now.
        new_tokens: Tokens of the answer.
        stats: Of its decoding; None if that never began.
        seconds: From the first token to the end.
    """

    reason: str
    text: str = ""
    new_tokens: int = 0
    stats: DecodeStats | None = None
    seconds: float = 0.0


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """One answer to write.

    Attributes:
        ids: The prompt.
        arguments: Of `generate`.
        seed: Of its random choices.
        writer: Makes text of tokens.
        tell: Called with every `Piece` and at last with the `End`, in the scheduler's thread; must not block.
        deadline: When it has to be over, by `time.monotonic`.
        drafts: Decode with drafts; False: plainly, and read the whole prompt.
        cancelled: Set by whoever does not want it any more.
        together: It is written in the batch over depth.
    """

    ids: list[int]
    arguments: dict[str, Any]
    seed: int
    writer: Writer
    tell: Callable[[Piece | End], None]
    deadline: float
    drafts: bool = True
    cancelled: bool = False
    together: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    decode: DiffuSpec | OverDepth | None = None
    steps: Iterator[Step] | None = None


class Scheduler:
    """The thread and its jobs.

    Args:
        model: What decodes.
        decode: How; its `KeptTexts` are what conversations go on from.
        metrics: Are told what happens.
        parallel: Jobs that take turns with drafts.
        queue: Jobs that may wait beside all that are at work.
        exit_rule: When a looped model's tokens stop; None: they run all cycles.
        over_depth: Decodes those that begin while there are more than `parallel`; None: nobody does.
    """

    def __init__(
        self,
        model: Any,
        decode: DiffuSpec,
        metrics: Metrics,
        *,
        parallel: int,
        queue: int,
        exit_rule: ExitRule | None = None,
        over_depth: OverDepth | None = None,
    ) -> None:
        self.model, self.decode, self.metrics, self.exit_rule = model, decode, metrics, exit_rule
        self._plain = own_plain(decode)
        self.parallel, self.queue = parallel, queue
        self.over_depth, self.places = over_depth, 0 if over_depth is None else over_depth.batch.rows
        self._running: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._end_at: float | None = None
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def room(self) -> int:
        """Jobs that it takes at once, running and waiting."""
        return self.parallel + self.places + self.queue

    @property
    def closing(self) -> bool:
        """Whether nothing new is taken."""
        return self._end_at is not None

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these, or none.

        Raises:
            ApiError: there is no room, or the server is closing.
        """
        with self._changed:
            if self.closing:
                raise ApiError(503, "The server is shutting down.", code="shutdown")
            if len(jobs) > self.room - len(self._running) - len(self._waiting):
                self.metrics.refused.inc()
                raise ApiError(429, "The server has as many requests as it takes; try again later.", code="queue_full")
            self._waiting.extend(jobs)
            self._count()
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more; their places are free within a step."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def close(self, grace: float) -> None:
        """Take no new jobs, and end those that are still running after this many seconds."""
        with self._changed:
            self._end_at = min(self._end_at or float("inf"), time.monotonic() + grace)
            self._changed.notify()

    def join(self) -> None:
        """Wait until all is over."""
        self._thread.join()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._next()) is not None:
            reason = self._overdue(job) or self._turn(job)
            with self._changed:
                self._running.popleft()
                if not reason:
                    self._running.append(job)
            if reason:
                self._finish(job, reason)

    def _next(self) -> Job | None:
        """Whose turn it is; None when the server closes and all is done."""
        with self._changed:
            while True:
                for job in list(self._waiting):
                    if reason := self._overdue(job):
                        self._waiting.remove(job)
                        self._finish(job, reason)
                while self._waiting and self._begins(self._waiting[0]):
                    self._running.appendleft(self._waiting.popleft())
                self._count()
                if self._running:
                    return self._running[0]
                if self.closing:
                    return None
                self._changed.wait()

    def _begins(self, job: Job) -> bool:
        """Whether there is a place for the job that waits first; decides which."""
        together = sum(other.together for other in self._running)
        many = len(self._running) + len(self._waiting) > self.parallel
        job.together = many and job.drafts and together < self.places
        return job.together or len(self._running) - together < self.parallel

    def _overdue(self, job: Job) -> str:
        """Why a job ends here, whatever it has written."""
        now = time.monotonic()
        if job.cancelled:
            return "cancelled"
        if self._end_at is not None and now > self._end_at:
            return "shutdown"
        return "timeout" if now > job.deadline else ""

    def _turn(self, job: Job) -> str:
        """One step; returns why it was the last one."""
        try:
            if job.steps is None:
                ids = torch.tensor([job.ids], device=self.model.device)
                decode = self.over_depth if job.together else self.decode if job.drafts else self._plain
                assert decode is not None
                job.decode = decode.seeded(job.seed)
                job.steps = job.decode.iterate(
                    self.model, ids, exit_rule=self.exit_rule, attention_mask=torch.ones_like(ids), **job.arguments
                )
            step = next(job.steps, None)
            if step is None:
                return "length"
            (row,) = step.rows
            if row is None:
                return ""
            if job.first_at is None:
                job.first_at = time.monotonic()
                self.metrics.first_token.observe(job.first_at - job.asked_at)
            elif not job.together:
                self.metrics.step(row)
            job.tell(job.writer.add(row))
            full = job.writer.count >= job.arguments["max_new_tokens"]
            return job.writer.ended or ("length" if full else "")
        except Exception:
            # whatever it was, the other requests go on
            logger.exception("a request failed")
            return "error"

    def _finish(self, job: Job, reason: str) -> None:
        """Free what a job holds, and say that it is over."""
        steps, job.steps = job.steps, None
        text = ""
        try:
            if steps is not None:
                # what it knows is kept for the next turn of the conversation
                steps.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
            text = job.writer.rest()
        except Exception:
            logger.exception("a request failed at its end")
            reason = "error"
        stats = job.decode.last_stats if job.decode is not None else None
        seconds = 0.0 if job.first_at is None else time.monotonic() - job.first_at
        end = End(reason=reason, text=text, new_tokens=job.writer.count, stats=stats, seconds=seconds)
        self.metrics.end(end, time.monotonic() - job.asked_at)
        job.tell(end)

    def _count(self) -> None:
        self.metrics.running.set(len(self._running))
        self.metrics.together.set(sum(job.together for job in self._running))
        self.metrics.waiting.set(len(self._waiting))
