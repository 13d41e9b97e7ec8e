"""Finds the thresholds of an exit rule for a compute budget or for a bound on the loss, on a given text.

Thresholds are placed on every other block: one for all cycles at quantiles of the rule's own scores, one for each cycle
at prices of compute (`thresholds`). Each candidate is measured on the blocks between, with its exits applied; the
interval in which the target is met for the first time is halved a few times. What is best there is taken.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.common.outputs import write_json
from zerodraft.ztt.exits import ExitPolicy, ExitRule, ScoredRule, exit_rule_from_dict, exit_rule_to_dict
from zerodraft.ztt.model import ZttForCausalLM
from zerodraft.ztt.placing import Placing
from zerodraft.ztt.tradeoff import LEVELS, Point, Ruler, fixed_depths, scored_rule, trade_off

HALVINGS = 5
"""How often the interval around the target is halved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeBudget:
    """At most this much compute, and then the lowest loss.

    Args:
        flops: Share of the FLOPs without exits, above 0 and at most 1.
        mean_cycles: Cycles per token; one of the two.
    """

    flops: float | None = None
    mean_cycles: float | None = None

    def __post_init__(self) -> None:
        if (self.flops is None) == (self.mean_cycles is None):
            raise ZerodraftError("A compute budget is given either as flops or as mean_cycles.")
        if self.flops is not None and not 0 < self.flops <= 1:
            raise ZerodraftError(f"A compute budget of {self.flops:g} of the FLOPs is not above 0 and at most 1.")
        if self.mean_cycles is not None and not self.mean_cycles >= 1:
            raise ZerodraftError(f"A compute budget of {self.mean_cycles:g} cycles per token is below 1.")

    def met_by(self, point: Point) -> bool:
        """Whether the measured compute is within the budget."""
        return point.flops <= self.flops if self.flops is not None else point.mean_cycles <= (self.mean_cycles or 0)

    def best(self, points: Sequence[Point]) -> Point:
        """The point that wins among those that meet the budget."""
        return min(points, key=lambda point: (point.loss, point.flops))

    def unreachable(self, points: Sequence[Point]) -> str:
        """Why none of the points will do, with what comes nearest."""
        least = min(points, key=lambda point: point.flops if self.flops is not None else point.mean_cycles)
        asked = f"{self.flops:g} of the FLOPs" if self.flops is not None else f"{self.mean_cycles:g} cycles per token"
        return (
            f"A budget of {asked} cannot be reached with this rule: the least is {least.flops:.3f} of the FLOPs at "
            f"{least.mean_cycles:.2f} cycles per token, with a loss of {least.loss:.3f} instead of "
            f"{least.loss - least.loss_increase:.3f}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBound:
    """At most this much more loss, and then the least compute.

    Args:
        relative: Increase as a share of the loss without exits.
        absolute: Increase in nats; one of the two.
    """

    relative: float | None = None
    absolute: float | None = None

    def __post_init__(self) -> None:
        if (self.relative is None) == (self.absolute is None):
            raise ZerodraftError("A loss bound is given either as relative or as absolute.")

    def met_by(self, point: Point) -> bool:
        """Whether the measured increase is within the bound."""
        if self.relative is not None:
            return point.relative_increase <= self.relative
        return point.loss_increase <= (self.absolute or 0)

    def best(self, points: Sequence[Point]) -> Point:
        """The point that wins among those that meet the bound."""
        return min(points, key=lambda point: (point.flops, point.loss))

    def unreachable(self, points: Sequence[Point]) -> str:
        """Why none of the points will do, with what comes nearest."""
        least = min(points, key=lambda point: point.loss_increase)
        asked = f"{self.relative:.2%}" if self.relative is not None else f"{self.absolute:g} nats"
        return (
            f"A loss increase of at most {asked} cannot be reached with exits by this rule: the smallest measured is "
            f"{least.relative_increase:.2%} ({least.loss_increase:.4f} nats) at {least.flops:.3f} of the FLOPs and "
            f"{least.mean_cycles:.2f} cycles per token."
        )


Target = ComputeBudget | LossBound


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationResult:
    """What was found.

    Attributes:
        rule: The rule with its thresholds, ready for `generate(exit_rule=...)`.
        target: What was asked for.
        chosen: The rule's measurement.
        full: The model without exits.
        curve: Everything measured with the rule, from much compute to little.
        policy: Under which it was measured.
        tokens: How many tokens it was measured on, in blocks of `block_length`; it was placed on as many others.
    """

    rule: ExitRule
    target: Target
    chosen: Point
    full: Point
    curve: tuple[Point, ...]
    policy: ExitPolicy
    tokens: int
    block_length: int

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        points = {"chosen": asdict(self.chosen), "full": asdict(self.full), "curve": [asdict(p) for p in self.curve]}
        target = {key: value for key, value in asdict(self.target).items() if value is not None}
        text = {"policy": self.policy, "tokens": self.tokens, "block_length": self.block_length}
        return {"rule": self.chosen.rule, "target": target, **points, **text}


def calibrate(
    model: ZttForCausalLM,
    blocks: Int[Tensor, "rows t"],
    rule: str | ExitRule = "zero-mass",
    *,
    target: Target,
    policy: ExitPolicy = "propagate",
    batch_size: int = 8,
    levels: Sequence[float] = LEVELS,
    halvings: int = HALVINGS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationResult:
    """Find the threshold, or one for each cycle, with which a rule meets a target on a text.

    Args:
        model: With several cycles.
        blocks: The text in token ids; each row is read on its own. Thresholds are placed on every other one, and
            measured on those between (of a single one, on itself).
        rule: Name, or a rule whose options (not its threshold) are kept: `ZeroMassExit(threshold=0, pool="max")`.
        target: `ComputeBudget(...)` or `LossBound(...)`.
        policy: What deeper cycles see of exited tokens.
        batch_size: Rows per forward pass.
        levels: Where the trade-off is measured, see `zerodraft.ztt.tradeoff.LEVELS`.
        halvings: How often the interval around the target is halved.
        progress: Called with the number of forward passes done and expected.

    Raises:
        ZerodraftError: the model, text or rule does not fit, or the target cannot be reached (with what can).
    """
    template = scored_rule(rule)
    done = 0

    def on_batch() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    before, ruler = (Ruler(model, half, policy, batch_size, on_batch) for half in halves(blocks))
    measured = 2 * (len(levels) + halvings)
    total = before.passes * (model.config.cycles + 2) + ruler.passes * (1 + measured)
    placing = Placing(before, template, fixed_depths(before))
    curve = search(ruler, placing.for_all, levels, target, halvings=halvings)
    curve += search(ruler, placing.for_each, placing.prices(len(levels)), target, halvings=halvings)
    progress(total, total)
    return choose(ruler, sorted(curve, key=lambda point: -point.flops), target)


def halves(blocks: Int[Tensor, "rows t"]) -> tuple[Int[Tensor, "before t"], Int[Tensor, "between t"]]:
    """Every other block, to place thresholds on, and those between, to measure on; of a single one itself."""
    return blocks[::2], blocks[1::2] if len(blocks) > 1 else blocks


def search(
    ruler: Ruler,
    place: Callable[[float], ScoredRule],
    at: Sequence[float],
    target: Target,
    *,
    halvings: int = HALVINGS,
) -> tuple[Point, ...]:
    """Measure the trade-off of a rule, more closely around a target; from rare to frequent exits.

    Args:
        ruler: Measures.
        place: The rule at a level or price, see `placing`.
        at: Levels or prices to begin with.
        target: What is looked for.
        halvings: How often the interval around the target is halved.
    """
    points = trade_off(ruler, place, at)
    for _ in range(halvings):
        bracket = _bracket(points, target)
        if bracket is None:
            break
        # geometrically, but for the interval from zero
        value = math.prod(bracket) ** 0.5 or max(bracket) / 2
        points[value] = ruler.measure(place(value))
    return tuple(points[value] for value in sorted(points))


def choose(ruler: Ruler, curve: Sequence[Point], target: Target) -> CalibrationResult:
    """The best point of a measured trade-off.

    Raises:
        ZerodraftError: none meets the target.
    """
    met = [point for point in curve if target.met_by(point)]
    if not met:
        raise ZerodraftError(target.unreachable(curve))
    chosen = target.best(met)
    assert chosen.rule is not None
    return CalibrationResult(
        rule=exit_rule_from_dict(chosen.rule),
        target=target,
        chosen=chosen,
        full=ruler.full,
        curve=tuple(curve),
        policy=ruler.policy,
        tokens=ruler.blocks.numel(),
        block_length=ruler.blocks.shape[1],
    )


def _bracket(points: dict[float, Point], target: Target) -> tuple[float, float] | None:
    """Neighbouring levels or prices of which one meets the target and the other does not; None if there are no such.

    More exits come nearer to a budget and farther from a loss bound, so the first change from rare to frequent exits
    counts for a budget, and the last for a bound. Level 0 (nobody stops) is not measured: it meets every bound and no
    budget.
    """
    is_bound = isinstance(target, LossBound)
    met = [(0.0, is_bound)] + [(level, target.met_by(points[level])) for level in sorted(points)]
    changes = [(a, b) for (a, x), (b, y) in pairwise(met) if x != y and x == is_bound]
    return None if not changes else changes[-1] if is_bound else changes[0]


def write_exit_rule(model: ZttForCausalLM, rule: ExitRule, directory: str | os.PathLike[str] | None = None) -> None:
    """Put the rule into the model's configuration, and into the `config.json` of its directory if one is given.

    Raises:
        ZerodraftError: the directory has no configuration of such a model.
    """
    stored = exit_rule_to_dict(rule)
    if directory is not None:
        path = Path(directory) / "config.json"
        config = read_json(path, "configuration")
        if config.get("model_type") != model.config.model_type:
            raise ZerodraftError(f"{str(path)!r} is not the configuration of a Zero Token Transformer.")
        write_json(path, config | {"exit_rule": stored}, sort_keys=True)
    model.config.exit_rule = stored
