"""`zerodraft finetune`: trains an existing model further as a recipe says, converting a plain one first."""

from dataclasses import dataclass
from typing import ClassVar

from zerodraft.cli.command import Result
from zerodraft.cli.training import TrainingCommand
from zerodraft.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Finetune(TrainingCommand):
    """Train an existing model further, as a YAML recipe says; a plain model is converted first.

    Any key of the recipe can be set on the command line too, where it wins over the file.
    """

    example: ClassVar[str] = "zerodraft finetune recipes/smollm2-deepen.yaml --model.start DIR --peft.rank 8"

    def train(self, recipe: Recipe) -> Result:
        """See `zerodraft.training.run.finetune`."""
        from zerodraft.training.run import finetune

        return finetune(recipe, resume=self.resume)
