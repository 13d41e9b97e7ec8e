"""`zerodraft train-drafter`: trains a drafter for a target on the target's own completions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, explained, overrides_of
from zerodraft.training.drafters.kinds import RECIPES
from zerodraft.training.drafters.recipe import CompletionsRecipe
from zerodraft.training.recipe import read_recipe

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(RECIPES)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDrafter(Command):
    """Train a drafter for a target on the target's own completions (see `zerodraft distill`).

    Settings come from flags, from a YAML file (--recipe), or from both; flags win. Each kind refuses the sections and
    keys that only others have.
    """

    example: ClassVar[str] = "zerodraft train-drafter --target smollm2 --data completions --out runs/drafter"

    kind: Kind = explained(
        ". ".join(f"{kind}: {recipe.about}" for kind, recipe in RECIPES.items()), default=next(iter(RECIPES))
    )
    recipe: str | None = None
    """YAML file with any of the settings."""
    resume: bool = False
    """Continue from the last checkpoint in `out`."""
    overrides: dict[str, Any] = overrides_of(*RECIPES.values())

    def check(self) -> None:
        """Reads the settings."""
        self._settings()

    def run(self, console: Console) -> Result:
        """Trains and reports what was measured."""
        recipe = self._settings()
        results = recipe.train(resume=self.resume)
        held_back = results["held_back"]
        console.print(
            f"trained {results['trained_parameters']:,} parameters on {results['blocks']:,} blocks in "
            f"{results['seconds']:.0f} s"
        )
        table = Table("position", "accepted", box=None, pad_edge=False)
        for position, share in enumerate(held_back["by_position"], 1):
            table.add_row(str(position), f"{share:.3f}")
        console.print(table)
        console.print(
            f"{held_back['mat']:.2f} tokens per target pass on {held_back['sequences']} held-back completions (greedy, "
            "plain drafts)"
        )
        console.print(f"written to {recipe.out}: model/, results.json, log.jsonl")
        return results

    def _settings(self) -> CompletionsRecipe:
        """The recipe of the kind; a setting of another kind is an unknown key."""
        return read_recipe(RECIPES[self.kind], self.recipe, self.overrides)
