"""`zerodraft train-drafter`: trains a drafter for a target on the target's own completions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, overrides_of
from zerodraft.training.drafters.autoregressive_recipe import AutoregressiveRecipe, load_autoregressive_recipe
from zerodraft.training.drafters.masked_recipe import MaskedRecipe, load_masked_recipe
from zerodraft.training.drafters.recipe import DrafterRecipe, load_drafter_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnSections:
    """The sections that one kind of drafter alone has."""

    masked: MaskedRecipe = field(default_factory=MaskedRecipe)
    autoregressive: AutoregressiveRecipe = field(default_factory=AutoregressiveRecipe)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDrafter(Command):
    """Train a drafter for a target on the target's own completions (see `zerodraft distill`).

    Settings come from flags, from a YAML file (--recipe), or from both; flags win. The sections [masked] and
    [autoregressive] belong to these kinds (whose learning rate is 3e-4 if not given), [drafter] and [loss] to others.
    """

    example: ClassVar[str] = "zerodraft train-drafter --target smollm2 --data completions --out runs/drafter"

    kind: Literal["block", "masked", "autoregressive", "dflash"] = "block"
    """block: a few layers that read the target's hidden states. masked: the target's layers as a masked diffusion model
    of its own. autoregressive: a few of the target's layers as a small causal model. dflash: the DFlash network, whose
    files other runtimes read."""
    recipe: str | None = None
    """YAML file with any of the settings."""
    resume: bool = False
    """Continue from the last checkpoint in `out`."""
    overrides: dict[str, Any] = overrides_of(DrafterRecipe)
    own_overrides: dict[str, Any] = overrides_of(OwnSections)

    def check(self) -> None:
        """Reads the settings."""
        self._settings()

    def run(self, console: Console) -> Result:
        """Trains and reports what was measured."""
        recipe = self._settings()
        results = self._train()(recipe, resume=self.resume)
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

    def _settings(self) -> Any:
        """The recipe of the kind; a setting of another kind is an unknown key."""
        given = {**self.overrides, **self.own_overrides}
        if self.kind == "masked":
            return load_masked_recipe(self.recipe, given)
        if self.kind == "autoregressive":
            return load_autoregressive_recipe(self.recipe, given)
        if self.kind == "dflash":
            from zerodraft.training.drafters.dflash import load_dflash_recipe

            return load_dflash_recipe(self.recipe, given)
        return load_drafter_recipe(self.recipe, given)

    def _train(self) -> Callable[..., dict[str, Any]]:
        if self.kind == "masked":
            from zerodraft.training.drafters.masked import train_masked

            return train_masked
        if self.kind == "autoregressive":
            from zerodraft.training.drafters.autoregressive import train_autoregressive

            return train_autoregressive
        if self.kind == "dflash":
            from zerodraft.training.drafters.dflash import train_dflash

            return train_dflash
        from zerodraft.training.drafters.block import train_drafter

        return train_drafter
