"""`zerodraft train-drafter`: trains a block-diffusion drafter for a target on the target's own completions."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, overrides_of
from zerodraft.training.drafter_recipe import DrafterRecipe, load_drafter_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDrafter(Command):
    """Train a block-diffusion drafter for a target on the target's own completions (see `zerodraft distill`).

    Settings come from flags, from a YAML file (--recipe), or from both; flags win.
    """

    example: ClassVar[str] = "zerodraft train-drafter --target smollm2 --data completions --out runs/drafter"

    recipe: str | None = None
    """YAML file with any of the settings."""
    resume: bool = False
    """Continue from the last checkpoint in `out`."""
    overrides: dict[str, Any] = overrides_of(DrafterRecipe)

    def check(self) -> None:
        """Reads the settings."""
        load_drafter_recipe(self.recipe, self.overrides)

    def run(self, console: Console) -> Result:
        """Trains and reports what was measured."""
        from zerodraft.training.drafter import train_drafter

        recipe = load_drafter_recipe(self.recipe, self.overrides)
        results = train_drafter(recipe, resume=self.resume)
        held_back = results["held_back"]
        console.print(
            f"trained {results['parameters']:,} parameters on {results['blocks']:,} blocks in "
            f"{results['seconds']:.0f} s"
        )
        table = Table("position", "accepted", box=None, pad_edge=False)
        for position, share in enumerate(held_back["by_position"], 1):
            table.add_row(str(position), f"{share:.3f}")
        console.print(table)
        console.print(
            f"{held_back['mat']:.2f} tokens per target pass on {held_back['sequences']} held-back completions (greedy, "
            "plain blocks)"
        )
        console.print(f"written to {recipe.out}: model/, results.json, log.jsonl")
        return results
