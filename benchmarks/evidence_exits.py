"""What `exits.py` found: loss over FLOPs of every rule against the line through the best fixed depths."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from evidence_plan import OfRun
from evidence_statistics import verdict
from evidence_table import Look
from evidence_text import grid
from zerodraft.ztt.compare import Interval
from zerodraft.ztt.plot import plot_trade_off
from zerodraft.ztt.tradeoff import Point

MOST_OF_ONE_DEPTH = 0.95
"""Share of the tokens; beyond it a rule is hardly more than a fixed depth, and lies on the line for that."""

HEAD = f"""## Exit rules

Loss over counted FLOPs of every rule against the line through the best fixed depths: its lower convex hull, which two
depths mixed at random reach without any rule, and no further than to the lowest of them. A fixed depth costs what a
model with so many cycles costs, without the keys and values that exits leave behind. Thresholds are placed on every
other block of the validation text, and the one is chosen that lies lowest against the line there, of those that leave
at most {MOST_OF_ONE_DEPTH:.0%} of the tokens at one depth. What is shown was measured on the blocks between, with the
exits really applied. Intervals are a bootstrap over blocks.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A rule at one threshold."""

    level: float | None = None
    """With one threshold for all cycles: share of all scores that would stop a token."""
    price: float | None = None
    """With one for each cycle: of all the FLOPs of a token, in nats."""
    point: Point
    """On the blocks between."""
    above: Interval
    """Its loss over that of the line at the same FLOPs, there."""
    above_before: float
    """The same on the blocks that thresholds are placed on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """Every token at its best depth, for one who knows more than a rule."""

    price: float
    """Of all the FLOPs of a token, in nats."""
    flops: float
    """As a share of those without exits."""
    loss: float
    above: float
    """Loss over that of the line at the same FLOPs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exits(OfRun):
    """All rules on one model."""

    fixed: tuple[Point, ...]
    """The same depth for all tokens, 1 to all cycles."""
    rules: dict[str, tuple[Measured, ...]]
    """By name, with one threshold for all cycles, and by `NAME, each cycle`."""
    ceilings: dict[str, tuple[Ceiling, ...]] = field(default_factory=dict)
    """By what is known: the token's `losses` after each cycle, or the `last prediction`."""

    def chosen(self, rule: str) -> Measured:
        """Of the thresholds that tell tokens apart, the one that lay lowest against the line where they were placed."""
        telling = [measured for measured in self.rules[rule] if max(measured.point.depths) <= MOST_OF_ONE_DEPTH]
        return min(telling or self.rules[rule], key=lambda measured: measured.above_before)

    def best(self) -> tuple[str, Measured]:
        """The rule that lay lowest against the line where thresholds were placed, at its chosen one, of those that
        cost less than all cycles do, if there are any."""
        chosen = {rule: self.chosen(rule) for rule in self.rules}
        cheaper = {rule: measured for rule, measured in chosen.items() if measured.point.flops < 1}
        return min((cheaper or chosen).items(), key=lambda item: item[1].above_before)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitTable(Look):
    """What was found in the runs of a table."""

    benchmark: ClassVar[str] = "exit-rules"
    script: ClassVar[str] = "exits.py"

    results: tuple[Exits, ...]


def section(found: ExitTable) -> Iterator[str]:
    """Everything about the runs of one table."""
    yield f"### Rules on {found.table}\n"
    yield f"From `{found.provenance.get('command', '-')}`.\n"
    rows = [row for exits in found.results for row in (fixed_row(exits), *rule_rows(exits))]
    yield grid(["run", "rule", "cycles a token", "FLOPs", "loss", "loss over the line", "of the loss", "verdict"], rows)
    for exits in found.results:
        yield f"![Loss over FLOPs of {exits.run}]({figure(found.table, exits)})\n"


def fixed_row(exits: Exits) -> list[str]:
    """The fixed depths of a model, in the words of the table."""
    losses = ", ".join(f"{point.loss:.4f}" for point in exits.fixed)
    costs = ", ".join(f"{point.flops:.0%}" for point in exits.fixed)
    return [f"`{exits.run}`", "the same for all", f"1 to {len(exits.fixed)}", costs, losses, "-", "-", "-"]


def rule_rows(exits: Exits) -> Iterator[list[str]]:
    """Each rule at its chosen threshold."""
    for rule in exits.rules:
        chosen = exits.chosen(rule)
        point, above = chosen.point, chosen.above
        yield [
            f"`{exits.run}`",
            rule,
            f"{point.mean_cycles:.2f}",
            f"{point.flops:.1%}",
            f"{point.loss:.4f}",
            str(above),
            f"{above.mean / (point.loss - above.mean):+.2%}",
            f"**{verdict(above)}**",
        ]


def draw_exits(found: ExitTable, page: Path) -> None:
    """The trade-off of each run, beside the page."""
    for exits in found.results:
        curves = {rule: [measured.point for measured in points] for rule, points in exits.rules.items()}
        plot_trade_off(page.parent / figure(found.table, exits), curves, fixed=exits.fixed, title=str(exits.run))


def figure(table: str, exits: Exits) -> str:
    """Where the figure of a run lies, seen from the page."""
    return f"figures/evidence-{ExitTable.benchmark}-{table}-{exits.arm}-{exits.rate}-{exits.seed}.png"
