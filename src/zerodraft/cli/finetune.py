"""`zerodraft finetune`: trains an existing model further, as a recipe says or on a file alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console

from zerodraft.cli.command import Result, metavar, positional
from zerodraft.cli.training import TrainingCommand
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.recipe import Recipe, load_recipe, read_recipe

DEFAULTS: dict[str, Any] = {
    "data.validation_fraction": 0.05,
    "loss.kind": "weighted",
    "loss.weights": "linear",
    "training.steps": 200,
    "training.batch_size": 4,
    "training.learning_rate": 5e-5,
    "training.ztt_learning_rate": 5e-3,
    "training.schedule": "cosine",
    "training.warmup_steps": 20,
    "training.weight_decay": 0.0,
    "training.save_every": 100,
}
"""What a run without a recipe has other than a recipe: every exit is trained, gently except for what is new."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune(TrainingCommand):
    """Train an existing model further; a plain model is converted first.

    Settings come from a YAML recipe. With --model, --data and --output alone, settings for a small text are used and
    printed. Any key of a recipe is also a flag, which wins over the file.
    """

    example: ClassVar[str] = "zerodraft finetune --model smollm2 --data notes.txt --output runs/notes"

    recipe: str | None = positional("RECIPE.yaml", default=None)
    """The recipe."""
    model: str | None = metavar("MODEL", default=None)
    """Short for --model.start."""
    data: tuple[str, ...] = metavar("FILE...", default=())
    """Short for --data.train."""

    def settings(self) -> Recipe:
        """The recipe, or the defaults, with the flags that win over it."""
        short = {"model.start": self.model, "data.train": self.data}
        overrides = {**{key: value for key, value in short.items() if value}, **self.overrides}
        if self.recipe is not None:
            return load_recipe(self.recipe, overrides)
        needed = {"model.start": "--model", "data.train": "--data", "output": "--output"}
        if missing := [flag for key, flag in needed.items() if key not in overrides]:
            raise ZerodraftError(f"without a recipe finetune needs --model, --data and --output: give {missing[0]}")
        return read_recipe(Recipe, None, {**DEFAULTS, **overrides})

    def run(self, console: Console) -> Result:
        """Shows the defaults that are used, trains and reports."""
        if self.recipe is None:
            taken = ", ".join(f"{key} {value}" for key, value in DEFAULTS.items() if key not in self.overrides)
            console.print(f"no recipe, so {taken}; each is a flag, such as --training.steps 500")
        # not super(): a dataclass with slots is a new class, which the compiler's cell does not know
        return TrainingCommand.run(self, console)

    def train(self, recipe: Recipe) -> Result:
        """See `zerodraft.training.ztt.run.finetune`."""
        from zerodraft.training.ztt.run import finetune

        return finetune(recipe, resume=self.resume)
