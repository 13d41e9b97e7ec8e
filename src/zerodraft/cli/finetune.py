"""`zerodraft finetune`: trains an existing model further as a recipe says, converting a plain one first."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console

from zerodraft.cli.command import Command, Result, overrides_of, positional
from zerodraft.cli.report import training_report
from zerodraft.training.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune(Command):
    """Train an existing model further, as a YAML recipe says; a plain model is converted first.

    Any key of the recipe can be set on the command line too, where it wins over the file.
    """

    example: ClassVar[str] = "zerodraft finetune recipes/smollm2-deepen.yaml --model.start DIR --peft.rank 8"

    recipe: str = positional("RECIPE.yaml")
    """The recipe; its `model.start` names the model."""
    resume: bool = False
    """Continue from the last checkpoint in the recipe's `output`."""
    overrides: dict[str, Any] = overrides_of(Recipe)

    def check(self) -> None:
        """Reads the recipe."""
        load_recipe(self.recipe, self.overrides)

    def run(self, console: Console) -> Result:
        """Trains and reports what was measured."""
        from zerodraft.training.run import finetune

        recipe = load_recipe(self.recipe, self.overrides)
        results = finetune(recipe, resume=self.resume)
        training_report(console, recipe.output, results)
        return results
