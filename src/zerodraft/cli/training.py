"""What `zerodraft pretrain` and `zerodraft finetune` share: a recipe with flags that win over it, and the report."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, overrides_of, positional
from zerodraft.training.recipe import Recipe, load_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCommand(Command):
    """A command that trains as a recipe says; sub-classes say how."""

    recipe: str = positional("RECIPE.yaml")
    """The recipe."""
    resume: bool = False
    """Continue from the last checkpoint in the recipe's `output`."""
    overrides: dict[str, Any] = overrides_of(Recipe)

    def settings(self) -> Recipe:
        """The recipe with the flags that win over it."""
        return load_recipe(self.recipe, self.overrides)

    def check(self) -> None:
        """Reads the recipe."""
        self.settings()

    def run(self, console: Console) -> Result:
        """Trains and reports what was measured."""
        recipe = self.settings()
        results = self.train(recipe)
        training_report(console, recipe.output, results)
        return results

    @abstractmethod
    def train(self, recipe: Recipe) -> Result:
        """Runs the recipe; returns what is in the run's `results.json`."""


def training_report(console: Console, output: str, results: dict[str, Any]) -> None:
    """Speed, and loss and perplexity after each number of cycles for every evaluation text."""
    trained, parts = results["trained_parameters"], results["trained"]
    named = ", ".join(f"{part.replace('_', ' ')} {count:,}" for part, count in parts.items())
    console.print(
        f"trained {trained:,} parameters ({named}) on {results['tokens']:,} tokens in {results['seconds']:.0f} s "
        f"({results['tokens_per_second']:,.0f} tokens/s)"
    )
    table = Table("text", "cycles", "loss", "perplexity", box=None, pad_edge=False)
    for key, loss in results["evaluation"].items():
        text, separator, cycles = key.removeprefix("eval_").rpartition("_loss_")
        if separator:
            perplexity = results["evaluation"][f"eval_{text}_perplexity_{cycles}"]
            table.add_row(text, cycles, f"{loss:.4f}", f"{perplexity:.2f}")
    console.print(table)
    console.print(f"written to {output}: model/, results.json, log.jsonl")
