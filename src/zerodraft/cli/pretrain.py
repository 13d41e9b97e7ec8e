"""`zerodraft pretrain`: trains a model from scratch as a recipe says."""

from dataclasses import dataclass
from typing import ClassVar

from zerodraft.cli.command import Result
from zerodraft.cli.training import TrainingCommand
from zerodraft.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain(TrainingCommand):
    """Train a model from scratch, tokenizer included, as a YAML recipe says.

    Any key of the recipe is also a flag, which wins over the file.
    """

    example: ClassVar[str] = "zerodraft pretrain recipes/ztt-tiny.yaml --training.steps 100 --output runs/try"

    def train(self, recipe: Recipe) -> Result:
        """See `zerodraft.training.ztt.run.pretrain`."""
        from zerodraft.training.ztt.run import pretrain

        return pretrain(recipe, resume=self.resume)
