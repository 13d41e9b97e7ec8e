"""What speedup the measured acceptance would give on another machine, whose costs the user states.

Modelled, not measured: a run has told how many tokens each step drafted and how many of them were accepted; the time
of each step is taken from the stated costs instead of the clock. Passes over the prompt are left out on both sides.

A kind of step is `[drafted, accepted, times, by_model]`: the last is 1 if a model drafted, 0 if tokens were only copied
(or none were drafted), which costs no draft. Where results lack it, all drafts count as a model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zerodraft.common.errors import ZerodraftError

SCRIPT = Path(__file__).with_name("whatif.js")
"""The same sums, for a page on which costs can be changed."""
SYNTAX = "target_ms=30,draft_ms=4 or target_ms=1:30/8:45/32:80,draft_ms=4,other_ms=1"


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of a step's parts.

    Attributes:
        target_ms: Of a pass of the target, by the number of tokens that it scores; straight lines between, constant
            beyond.
        draft_ms: Of a model's draft, whatever its length; copies are free.
        other_ms: Of search, verification and the rest.
    """

    target_ms: Mapping[int, float]
    draft_ms: float
    other_ms: float = 0.0

    def target(self, tokens: int) -> float:
        """Cost of a pass over this many tokens."""
        known = sorted(self.target_ms)
        return float(np.interp(tokens, known, [self.target_ms[k] for k in known]))

    def step(self, drafted: int, by_model: bool) -> float:
        """Cost of a step with this many drafted tokens; without a draft it is a plain pass."""
        return self.target(drafted + 1) + self.draft_ms * by_model + self.other_ms * (drafted > 0)

    def __str__(self) -> str:
        curve = ", ".join(f"{ms:g} ms for {k}" for k, ms in sorted(self.target_ms.items()))
        target = f"target {curve} tokens" if len(self.target_ms) > 1 else f"target {curve.split(' for')[0]}"
        return f"{target}, draft {self.draft_ms:g} ms, other {self.other_ms:g} ms"


EXAMPLE = Costs({1: 30.0, 8: 33.0, 32: 45.0}, 4.0, 1.0)
"""Of a machine that fetches weights slowly and computes fast: 8 tokens cost it little more than one. Made up."""


def parse_costs(text: str) -> Costs:
    """The costs that `--what-if` states.

    Raises:
        ZerodraftError: they cannot be read, or make no sense.
    """
    given = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    known = {"target_ms", "draft_ms", "other_ms"}
    try:
        if not {"target_ms", "draft_ms"} <= set(given) <= known or len(given) != len(text.split(",")):
            raise ValueError
        points = [point.rpartition(":") for point in given["target_ms"].split("/")]
        target = {int(k or 1): float(ms) for k, _, ms in points}
        costs = Costs(target, float(given["draft_ms"]), float(given.get("other_ms", 0)))
    except ValueError as error:
        raise ZerodraftError(f"--what-if is '{text}'; it must look like {SYNTAX}") from error
    if min(target.values()) <= 0 or min(target) < 1 or costs.draft_ms < 0 or costs.other_ms < 0:
        raise ZerodraftError(f"--what-if is '{text}'; a pass of the target takes more than 0 ms, the rest 0 or more")
    return costs


def modelled_speedup(steps: Sequence[Sequence[int]], costs: Costs) -> float | None:
    """Tokens per second over those of plain decoding. None without steps."""
    tokens = sum((accepted + 1) * times for _, accepted, times, *_ in steps)
    spent = sum(costs.step(step[0], _by_model(step)) * step[2] for step in steps)
    return tokens * costs.target(1) / spent if spent else None


def break_even(steps: Sequence[Sequence[int]], costs: Costs) -> float | None:
    """The milliseconds that a draft may take before these steps are no faster than plain decoding. None where no model
    drafted."""
    drafts = sum(step[2] for step in steps if _by_model(step))
    tokens = sum((accepted + 1) * times for _, accepted, times, *_ in steps)
    rest = sum(costs.step(step[0], False) * step[2] for step in steps)
    return (tokens * costs.target(1) - rest) / drafts if drafts else None


def _by_model(step: Sequence[int]) -> bool:
    return bool(step[3] if len(step) > 3 else step[0])
