"""What a decoding call did: steps, drafted and accepted tokens, where the seconds went, and step by step if wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, get_args

Phase = Literal["prefill", "draft", "search", "verify"]


@dataclass(frozen=True, slots=True)
class RowStep:
    """One row's part of a step.

    Attributes:
        drafted: Tokens of the draft's nodes, parents before children.
        parents: The node that each follows; -1 for the text so far.
        accepted: The nodes that became text, in order.
        tokens: What became text: the accepted nodes' tokens, then (unless the text ended before) the target's own one.
        own: The target's own token after the accepted ones; None if the text ended before it.
        cycles: After how many cycles each of `tokens` was written, where `iterate` was given an exit rule.
    """

    drafted: list[int]
    parents: list[int]
    accepted: list[int]
    tokens: list[int]
    own: int | None
    cycles: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the target. The prompt's is a step without a draft; `rows` has None for a row that was finished, or
    whose prompt was read in part."""

    rows: list[RowStep | None]


@dataclass(slots=True)
class DecodeStats:
    """Counts and seconds of one call, over all rows.

    Attributes:
        rows: Texts generated at once.
        prompt_tokens: Tokens of the prompts, without padding.
        reused_tokens: Those of them that the target did not read, as their keys and values were kept.
        new_tokens: Tokens generated.
        steps: Passes of the target after the prompt's.
        row_steps: The same, counted once for each row that took part.
        plain_steps: Passes among them for which no draft was asked.
        fallback: What drafts had cost and brought when they were last given up for a while; empty if they never were.
        drafted: Drafted tokens that the target scored (all nodes of the trees).
        accepted: Drafted tokens that became text.
        tried_at: Drafts that had a token at position 1, 2, ...
        accepted_at: Drafts whose token at position 1, 2, ... became text.
        seconds: Time in `prefill`, `draft`, `search` and `verify`.
        total_seconds: Time of the whole call.
        trace: Every step, if asked for.
    """

    rows: int
    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    plain_steps: int = 0
    fallback: str = ""
    drafted: int = 0
    accepted: int = 0
    tried_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(get_args(Phase), 0.0))
    total_seconds: float = 0.0
    trace: list[Step] | None = None

    @property
    def mat(self) -> float:
        """Mean accepted tokens: new tokens per row and pass of the target, its own token counted, the prompt's pass
        not. Plain decoding has 1."""
        return (self.new_tokens - self.rows) / self.row_steps if self.row_steps else 1.0

    @property
    def other_seconds(self) -> float:
        """What is left of the total: stopping criteria, streaming, bookkeeping."""
        return max(self.total_seconds - sum(self.seconds.values()), 0.0)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole call."""
        return self.new_tokens / self.total_seconds if self.total_seconds else 0.0

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Count the time spent within."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += perf_counter() - start

    def count(self, step: Step, depths: list[int], *, draft: bool) -> None:
        """Take a step into account; `depths` says how many positions each row's draft had."""
        if self.trace is not None:
            self.trace.append(step)
        self.steps += draft
        for row, depth in zip(step.rows, depths, strict=True):
            if row is None:
                continue
            self.new_tokens += len(row.tokens)
            if not draft:
                continue
            self.row_steps += 1
            self.drafted += len(row.drafted)
            self.accepted += len(row.accepted)
            for counts, reached in ((self.tried_at, depth), (self.accepted_at, len(row.accepted))):
                counts.extend([0] * (max(depth, len(row.accepted)) - len(counts)))
                for position in range(reached):
                    counts[position] += 1

    def to_dict(self) -> dict[str, Any]:
        """Everything but the trace, as JSON has it."""
        seconds = {**self.seconds, "other": self.other_seconds, "total": self.total_seconds}
        return {
            "rows": self.rows,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "steps": self.steps,
            "plain_steps": self.plain_steps,
            "fallback": self.fallback or None,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "mat": self.mat,
            "tokens_per_second": self.tokens_per_second,
            "tried_at": list(self.tried_at),
            "accepted_at": list(self.accepted_at),
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
        }
