"""What training a masked diffusion drafter is: one frozen dataclass, read from YAML and from command-line flags alike.

Field docstrings are the help texts of the command line.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.taking import Take
from zerodraft.training.drafters.recipe import AdaptingRecipe, CompletionsRecipe
from zerodraft.training.strict import check_least

Masking = Literal["blocks", "block", "ratio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedRecipe:
    """--kind masked: the model's shape, and what is masked in training."""

    layers: int = 0
    """How many of the target's layers to take; 0: all."""
    take: Take = "last"
    """Which: the first, the last, or some from the first to the last at even distances."""
    masking: Masking = "blocks"
    """`ratio`: a random share of the completion, weighted by its inverse, as Dream and LLaDA were trained. `block`: the
    text up to a random place and masks behind it, as drafts are made. `blocks`: many such blocks in one pass, where
    known tokens see only those before them."""
    block_size: int = 8
    """Masks of a block; as many tokens are drafted at once."""
    blocks: int = 16
    """`blocks`: how many of them per sequence and step."""
    decay: float = 0.8
    """Position j of a block weighs decay to the power j."""
    start: str | None = None
    """Continue from this masked diffusion model (a folder) instead of from the target's layers."""

    def __post_init__(self) -> None:
        check_least("masked", self, layers=0, block_size=1, blocks=1)
        if not 0 < self.decay <= 1:
            raise ZerodraftError(f"masked.decay is {self.decay}; it must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDrafterRecipe(CompletionsRecipe):
    """One training run of a masked diffusion drafter."""

    kind: ClassVar[str] = "masked"
    about: ClassVar[str] = "the target's layers as a masked diffusion model of its own (section masked, rate 3e-4)"
    trainer: ClassVar[str] = "masked:train_masked"

    masked: MaskedRecipe = field(default_factory=MaskedRecipe)
    training: AdaptingRecipe = field(default_factory=AdaptingRecipe)
