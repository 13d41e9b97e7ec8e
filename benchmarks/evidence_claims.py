"""What is said of Zero Token Transformers, and what the tables say to it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import evidence_tasks
from evidence_exits import ExitTable
from evidence_statistics import Verdict, verdict
from evidence_table import Table, difference, texts_of
from evidence_text import grid, interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What is said about the method: that an arm has a lower loss than the other; no other: rules for exits tell."""

    text: str
    other: str | None = None
    arm: str = "ztt"
    options: bool = True
    """Whether arms with further options (`ztt-...`) are a test of it too."""

    def arms(self, table: Table) -> list[str]:
        """The arms of a table that test it."""
        return [arm for arm in table.arms() if arm == self.arm or (self.options and arm.startswith(f"{self.arm}-"))]


CLAIMS = (
    Claim(text="better than the vanilla model of equal parameters", other="vanilla"),
    Claim(text="better than basic cycling", other="basic"),
    Claim(text="better than head-tail cycling: zero tokens help", other="head-tail", options=False),
    Claim(
        text="better than head-tail cycling where both are fed the head's output again: zero tokens help",
        arm="ztt-input",
        other="head-tail-input",
        options=False,
    ),
    Claim(text="better than the vanilla model of equal parameters trained for as many FLOPs", other="vanilla-longer"),
    Claim(text="early exit cuts compute and keeps the quality: a rule is better than fixed depths of as many FLOPs"),
    Claim(
        text="pretrained models gain by fine-tuning as Zero Token Transformers",
        arm="deepened",
        other=evidence_tasks.BASELINE,
    ),
)


def claims(tables: Mapping[str, Table], exits: Sequence[ExitTable] = ()) -> Iterator[str]:
    """A row for each claim and each table that tests it."""
    yield (
        "What is said of Zero Token Transformers. A claim holds where the whole interval of the difference in the\n"
        "validation loss lies below 0. Parameters and FLOPs are those of the first arm in times of the second's. For\n"
        "exits they are in times of those of all cycles, and the difference is that to the line through fixed depths,\n"
        "over blocks of text, of the rule that was best on other blocks and costs less than all cycles.\n"
    )
    header = ["claim", "table", "arms", "validation loss", "other texts", "parameters, FLOPs", "pairs", "verdict"]
    rows = []
    for claim in CLAIMS:
        if claim.other is None:
            found = [row for table in exits for row in tested_exits(claim, table)]
        else:
            found = [row for name, table in tables.items() for row in tested(claim, claim.other, name, table)]
        rows += found or [[claim.text, *["-"] * (len(header) - 2), bold(verdict(None))]]
    yield grid(header, rows)


def tested(claim: Claim, other: str, name: str, table: Table) -> Iterator[list[str]]:
    """A claim's rows out of one table, where its arms are compared with an `other`."""
    for arm in claim.arms(table):
        value = difference(table, arm, other)
        if value is not None:
            of, over = (next(iter(table.best_rows(which).values())) for which in (arm, other))
            others = [f"{text} {interval(difference(table, arm, over.arm, text))}" for text in texts_of(table)[1:]]
            yield [
                claim.text,
                f"[{name}](#{name})",
                f"{arm}, {over.arm}",
                interval(value),
                "; ".join(others) or "-",
                f"{of.parameters / over.parameters:.3f}x, {of.flops / over.flops:.2f}x",
                str(value.count),
                bold(verdict(value)),
            ]


def tested_exits(claim: Claim, table: ExitTable) -> Iterator[list[str]]:
    """The row of each model whose rules were measured."""
    for exits in table.results:
        rule, measured = exits.best()
        yield [
            claim.text,
            "[exit rules](#exit-rules)",
            f"{rule} on {table.table}/{exits.run}",
            str(measured.above),
            "-",
            f"1.000x, {measured.point.flops:.2f}x",
            "1",
            bold(verdict(measured.above)),
        ]


def bold(text: Verdict) -> str:
    """A verdict as it stands out."""
    return f"**{text}**"
