"""What a table of evidence compares: a recipe, arms that change it, learning rates to try and seeds, in one YAML file.

Every (arm, rate, seed) is a run. Runs of one seed read the same text in the same order, so that arms are compared seed
by seed. All runs of the first seed come first: a table that is not finished is still balanced.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.training.data import TextData, build_data, read_documents
from zerodraft.training.folder import WITHOUT_EFFECT, differences
from zerodraft.training.recipe import Recipe, merge, read_recipe
from zerodraft.training.strict import check_least, from_mapping, to_mapping
from zerodraft.training.ztt.run import tokenizer_of

EQUAL_FOR_ALL = ("output", "seed", "tokenizer", "data")
"""Keys of the recipe that no arm may change: its runs would read other text, or in another order."""

NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Run(NamedTuple):
    """One training run of a table."""

    arm: str
    rate: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}/{self.rate}/{self.seed}"

    def is_below(self, name: str) -> bool:
        """Whether `name` means this run: ARM, ARM/RATE or ARM/RATE/SEED."""
        return f"{self}/".startswith(f"{name}/")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfRun:
    """What is said of one run."""

    arm: str
    rate: str
    seed: int

    @property
    def run(self) -> Run:
        """Which run it was."""
        return Run(self.arm, self.rate, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A table of evidence."""

    table: str
    """Its name, and that of the file with its results."""
    title: str = ""
    """What it shows, in a few words."""
    recipe: dict[str, Any]
    """The recipe that all runs start from."""
    arms: dict[str, dict[str, Any]]
    """What each arm changes in the recipe."""
    rates: dict[str, dict[str, float]]
    """Learning rates to try, by name: keys of the recipe's `training`."""
    seeds: tuple[int, ...]
    """Each one is a run of every arm."""
    sweep: int = 0
    """So many seeds, the first ones, are run with every rate, the others with the best of them alone; 0 means all."""
    baseline: str
    """The arm that the others are compared with."""
    bound: str | None = None
    """The arm of the unrolled depth without shared layers, for phi."""

    def __post_init__(self) -> None:
        check_least("plan", self, sweep=0)
        for name in (self.table, *self.arms, *self.rates):
            if not NAME.fullmatch(name):
                raise ZerodraftError(f"'{name}' is no name for a table, arm or rate: use a-z, 0-9, '.', '+' and '-'")
        for key in ("arms", "rates", "seeds"):
            if not getattr(self, key):
                raise ZerodraftError(f"the plan has no {key}: name at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ZerodraftError(f"seeds are {list(self.seeds)}: each one may be named only once")
        for key, arm in (("baseline", self.baseline), ("bound", self.bound)):
            if arm is not None and arm not in self.arms:
                raise ZerodraftError(f"{key} '{arm}' is none of the arms{did_you_mean(arm, self.arms)}")
        for arm, changes in self.arms.items():
            if changed := sorted({*changes} & {*EQUAL_FOR_ALL}):
                raise ZerodraftError(f"arm '{arm}' changes {changed[0]}, which must be the same for all arms")
        for run in self.runs():
            self.recipe_of(run, Path("runs"))

    def runs(self) -> Iterator[Run]:
        """All runs with every rate, in their order."""
        for seed in self.seeds:
            for rate in self.rates:
                for arm in self.arms:
                    yield Run(arm, rate, seed)

    def is_swept(self, seed: int) -> bool:
        """Whether a seed is run with every rate."""
        return not self.sweep or seed in self.seeds[: self.sweep]

    def changes_of(self, run: Run) -> dict[str, Any]:
        """The recipe of a run as far as it is not the default, without its folder."""
        changed = merge(merge(self.recipe, self.arms[run.arm]), {"training": self.rates[run.rate]})
        return {**changed, "seed": run.seed}

    def recipe_of(self, run: Run, folder: Path) -> Recipe:
        """The recipe of a run that lives in a folder for all of them."""
        return from_mapping(
            Recipe, {**self.changes_of(run), "output": str(folder / run.arm / run.rate / str(run.seed))}
        )


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file, which may extend another one: `extends: other.yaml`.

    Raises:
        ZerodraftError: no such file, or what is in it is no plan.
    """
    return read_recipe(Plan, path, ())


def read_data(plan: Plan) -> TextData:
    """The text of all runs, in tokens; kept for the next who ask.

    Raises:
        ZerodraftError: it is not there, or does not fit the recipe.
    """
    recipe = plan.recipe_of(next(plan.runs()), Path("runs"))
    documents = read_documents(recipe.data.train, recipe.data)
    return build_data(recipe.data, tokenizer_of(recipe, documents), documents)


def chosen(runs: Sequence[Run], only: str | None) -> list[Run]:
    """The runs that a name means, all without one.

    Raises:
        ZerodraftError: it means none.
    """
    found = [run for run in runs if only is None or run.is_below(only)]
    if not found:
        raise ZerodraftError(f"no run is called '{only}'{did_you_mean(only or '', {run.arm for run in runs})}")
    return found


def other_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ so that their results may differ too."""
    same = {"output", "data.cache", *(f"training.{name}" for name in (*WITHOUT_EFFECT, "use_cpu", "compile"))}
    return [key for key in differences(to_mapping(old), to_mapping(new)) if key not in same]
