"""`zerodraft pretrain`: trains a model from scratch as a recipe says."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console

from zerodraft.cli.command import Command, Result, overrides_of, positional
from zerodraft.cli.report import training_report
from zerodraft.training.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain(Command):
    """Train a model from scratch, tokenizer included, as a YAML recipe says.

    Any key of the recipe can be set on the command line too, where it wins over the file.
    """

    example: ClassVar[str] = "zerodraft pretrain recipes/ztt-tiny.yaml --training.steps 100 --output runs/try"

    recipe: str = positional("RECIPE.yaml")
    """The recipe."""
    resume: bool = False
    """Continue from the last checkpoint in the recipe's `output`."""
    overrides: dict[str, Any] = overrides_of(Recipe)

    def check(self) -> None:
        """Reads the recipe."""
        load_recipe(self.recipe, self.overrides)

    def run(self, console: Console) -> Result:
        """Trains and reports what was measured."""
        from zerodraft.training.run import pretrain

        recipe = load_recipe(self.recipe, self.overrides)
        results = pretrain(recipe, resume=self.resume)
        training_report(console, recipe.output, results)
        return results
