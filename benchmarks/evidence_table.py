"""The results of a table of evidence: one JSON file, written whole after every run; and what others beside it share."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, TypeVar

from evidence_plan import OfRun, Plan, Run, other_keys
from evidence_statistics import Estimate, paired
from zerodraft.bench.measure import write_result
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.training.recipe import ModelRecipe, Recipe
from zerodraft.training.strict import from_mapping, to_mapping

R = TypeVar("R", bound="Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a script here writes into a file; another kind is a subclass with further fields."""

    benchmark: ClassVar[str]
    """What its files call it."""
    script: ClassVar[str]
    """The file and command that writes it."""


def read_result(cls: type[R], path: Path) -> R:
    """A result from its file.

    Raises:
        ZerodraftError: it is damaged, or something else.
    """
    return from_mapping(cls, _read(cls, path))


def _read(cls: type[Result], path: Path) -> dict[str, Any]:
    found = read_json(path, "result")
    if found.pop("benchmark", None) != cls.benchmark:
        raise ZerodraftError(f"The result '{path}' is none of 'python benchmarks/{cls.script}'.")
    return found


def save_result(result: Result, path: Path) -> None:
    """Writes a result, beside its place first."""
    write_result(path, {"benchmark": result.benchmark, **to_mapping(result)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside(Result):
    """What was measured beside the runs of a table."""

    table: str
    provenance: dict[str, Any]

    @classmethod
    def file(cls, table: str) -> str:
        """The name of the file with a table's results."""
        return f"{cls.benchmark}-{table}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Look(Beside):
    """What was measured on the models of a table's finished runs."""

    results: tuple[OfRun, ...]


def best_rate(losses: Iterable[tuple[Run, float]], arm: str) -> str | None:
    """The rate with the lowest mean loss, over the seeds that all the arm's rates were run with; None of no losses."""
    tried: dict[str, dict[int, float]] = {}
    for run, loss in losses:
        if run.arm == arm:
            tried.setdefault(run.rate, {})[run.seed] = loss
    common = set.intersection(*map(set, tried.values())) if tried else set()
    means = {
        rate: fmean(loss for seed, loss in by_seed.items() if seed in (common or by_seed))
        for rate, by_seed in tried.items()
    }
    return min(means, key=lambda rate: means[rate], default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row(OfRun):
    """What came out of one run."""

    recipe: dict[str, Any]
    """As far as it is not the default."""
    parameters: int
    """Stored ones; a weight that is used in several places counts once."""
    layer_parameters: int
    """Those in layers: without embeddings, output matrix, final norm, and what ZTT adds to the layers."""
    steps: int
    tokens: int
    flops: int
    """Of the whole training."""
    seconds: float | None
    """Of the whole training at the speed of its last part; None where that was not measured."""
    losses: dict[str, tuple[float, ...]]
    """By text: nats per token after each cycle. The last one is the model's."""
    curve: tuple[tuple[float, ...], ...]
    """Steps, and the mean training loss up to there since the point before."""
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        complete = all(losses and all(map(math.isfinite, losses)) for losses in self.losses.values())
        if "validation" not in self.losses or not complete:
            raise ZerodraftError(f"the losses of {self.run} are not all there")

    @property
    def loss(self) -> float:
        """On the validation text, after the last cycle."""
        return self.losses["validation"][-1]

    @property
    def model(self) -> ModelRecipe:
        """The model's part of the recipe, defaults included."""
        return self.whole_recipe().model

    def whole_recipe(self) -> Recipe:
        """The recipe, defaults included."""
        return from_mapping(Recipe, {**self.recipe, "output": ""})


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverged(OfRun):
    """A run whose loss did not stay finite."""

    recipe: dict[str, Any]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Table(Result):
    """A plan and what came out of its runs so far."""

    benchmark: ClassVar[str] = "evidence"
    script: ClassVar[str] = "evidence.py run"
    plan: Plan
    rows: tuple[Row, ...] = ()
    diverged: tuple[Diverged, ...] = ()

    def done(self) -> set[Run]:
        """Runs that need not be made again."""
        return {found.run for found in (*self.rows, *self.diverged)}

    def arms(self) -> list[str]:
        """Arms with results, in the order of the plan."""
        known = dict.fromkeys([*self.plan.arms, *(row.arm for row in self.rows)])
        return [arm for arm in known if any(row.arm == arm for row in self.rows)]

    def best_rate(self, arm: str, beside: Sequence[str] = ()) -> str | None:
        """The arm's `best_rate` by the validation loss, of those that lost no run.

        Args:
            arm: Which one.
            beside: Only rates count that these arms were tried with too.
        """
        counting = {*self.rates_tried(arm)}.intersection(*map(self.rates_tried, beside)) - self.rates_lost(arm)
        return best_rate([(row.run, row.loss) for row in self.rows if row.rate in counting], arm)

    def best_rows(self, arm: str, beside: Sequence[str] = ()) -> dict[int, Row]:
        """An arm's results at its best rate, by seed; `beside` as in `best_rate`."""
        rate = self.best_rate(arm, beside)
        rows = sorted(self.rows, key=lambda row: row.seed)
        return {row.seed: row for row in rows if (row.arm, row.rate) == (arm, rate)}

    def rates_tried(self, arm: str) -> list[str]:
        """In the order of the plan."""
        tried = {found.rate for found in (*self.rows, *self.diverged) if found.arm == arm}
        return [rate for rate in dict.fromkeys([*self.plan.rates, *sorted(tried)]) if rate in tried]

    def rates_lost(self, arm: str) -> set[str]:
        """Those with which a run of the arm diverged."""
        return {found.rate for found in self.diverged if found.arm == arm}

    def wanted(self) -> list[Run]:
        """The plan's runs in their order. Of a seed that is not swept an arm has its best rate alone, and none before
        the runs that choose it are done."""
        done = self.done()
        runs = list(self.plan.runs())
        open_arms = {run.arm for run in runs if self.plan.is_swept(run.seed) and run not in done}
        best = {arm: None if arm in open_arms else self.best_rate(arm) for arm in self.plan.arms}
        return [run for run in runs if self.plan.is_swept(run.seed) or run.rate == best[run.arm]]


def read_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        ZerodraftError: it is damaged, or something else.
    """
    found = _read(Table, path)
    try:
        table = from_mapping(Table, found)
        for run, times in Counter(found.run for found in (*table.rows, *table.diverged)).items():
            if times > 1:
                raise ZerodraftError(f"{run} is in it twice")
        for row in table.rows:
            row.whole_recipe()
    except ZerodraftError as error:
        raise ZerodraftError(
            f"The result '{path}' is damaged ({error}): mend it, or move it away to collect finished runs again."
        ) from error
    return table


def open_table(path: Path, plan: Plan) -> Table:
    """The results of a plan so far; of none before its first run.

    Raises:
        ZerodraftError: the file is damaged, or its runs were made by a plan that said something else about them.
    """
    if not path.exists():
        return Table(plan=plan)
    table = read_table(path)
    for found in (*table.rows, *table.diverged):
        if found.arm in plan.arms and found.rate in plan.rates:
            check_same(found, plan, path)
    return Table(plan=plan, rows=table.rows, diverged=table.diverged)


def joined(table: Table, other: Table) -> Table:
    """A table with the results of another one, which was made elsewhere of the same plan or of some of its arms.

    Raises:
        ZerodraftError: both have a run, or their plans say different things.
    """
    plan, more = table.plan, other.plan
    if plan.table != more.table:
        raise ZerodraftError(f"these are two tables, '{plan.table}' and '{more.table}': join parts of one")
    changed = [arm for arm in plan.arms.keys() & more.arms.keys() if plan.arms[arm] != more.arms[arm]]
    changed += [key for key in ("recipe", "rates") if getattr(plan, key) != getattr(more, key)]
    if changed:
        raise ZerodraftError(f"the plans of the two parts differ in {min(changed)}: runs of both cannot be compared")
    if twice := table.done() & other.done():
        raise ZerodraftError(f"both parts hold {min(twice)}: take it out of one of them")
    whole = replace(
        plan,
        arms={**plan.arms, **more.arms},
        seeds=tuple(dict.fromkeys((*plan.seeds, *more.seeds))),
        bound=plan.bound or more.bound,
    )
    return Table(plan=whole, rows=(*table.rows, *other.rows), diverged=(*table.diverged, *other.diverged))


def check_same(found: Row | Diverged, plan: Plan, path: Path) -> None:
    """Raise `ZerodraftError` unless the plan would make the same run as the one that is in the file."""
    old = from_mapping(Recipe, {**found.recipe, "output": ""})
    if changed := other_keys(old, plan.recipe_of(found.run, Path("runs"))):
        raise ZerodraftError(
            f"'{path}' holds {found.run} with another {', '.join(changed)}: give the table, or the arm, another name"
        )


def difference(table: Table, arm: str, other: str, text: str = "validation") -> Estimate | None:
    """The loss of an arm minus that of another, paired by seed, each at its best rate of those that both have tried."""
    return paired(final_losses(table, arm, text, [other]), final_losses(table, other, text, [arm]))


def final_losses(table: Table, arm: str, text: str, beside: Sequence[str] = ()) -> dict[int, float]:
    """An arm's losses after the last cycle, by seed, at its best rate of those that the arms `beside` it have tried."""
    return {seed: row.losses[text][-1] for seed, row in table.best_rows(arm, beside).items() if text in row.losses}


def texts_of(table: Table) -> list[str]:
    """Names of the texts that losses were measured on, the validation text first."""
    return list(dict.fromkeys(["validation", *(text for row in table.rows for text in row.losses)]))
