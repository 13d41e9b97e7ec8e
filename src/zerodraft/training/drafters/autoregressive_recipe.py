"""What training an autoregressive drafter is: one frozen dataclass, read from YAML and from command-line flags alike.

Field docstrings are the help texts of the command line.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from zerodraft.drafters.taking import Take
from zerodraft.training.drafters.recipe import AdaptingRecipe, CompletionsRecipe
from zerodraft.training.strict import check_least


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoregressiveRecipe:
    """--kind autoregressive: the model's shape, and what is learned and measured."""

    layers: int = 4
    """How many of the target's layers to take; 0: all."""
    take: Take = "spread"
    """Which: the first, the last, or some from the first to the last at even distances."""
    positions: int = 64
    """Tokens of each completion that a step learns from, drawn at random; 0: all."""
    block_size: int = 6
    """Tokens drafted at once when the acceptance is measured."""
    start: str | None = None
    """Continue from this causal language model (a folder) instead of from the target's layers."""

    def __post_init__(self) -> None:
        check_least("autoregressive", self, layers=0, positions=0, block_size=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoregressiveDrafterRecipe(CompletionsRecipe):
    """One training run of an autoregressive drafter."""

    kind: ClassVar[str] = "autoregressive"
    about: ClassVar[str] = "a few of the target's layers as a small causal model (section autoregressive, rate 3e-4)"
    trainer: ClassVar[str] = "autoregressive:train_autoregressive"

    autoregressive: AutoregressiveRecipe = field(default_factory=AutoregressiveRecipe)
    training: AdaptingRecipe = field(default_factory=AdaptingRecipe)
