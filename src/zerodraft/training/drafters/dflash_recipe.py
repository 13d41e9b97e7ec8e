"""What training a DFlash drafter is: one frozen dataclass, read from YAML and from command-line flags alike.

Field docstrings are the help texts of the command line.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from zerodraft.training.drafters.recipe import DrafterRecipe
from zerodraft.training.strict import check_least


@dataclass(frozen=True, kw_only=True, slots=True)
class DFlashShape:
    """The drafter's shape."""

    layers: int = 4
    """Drafter layers; they start as copies of the target's last ones."""
    block_size: int = 8
    """Tokens drafted at once."""
    taps: int = 5
    """How many of the target's layers are tapped."""
    mask_token: int | None = None
    """The token that stands for a mask; the default is the last one that the completions do not hold."""
    start: str | None = None
    """Continue from this drafter (a folder in any DFlash layout) instead of from the target's layers."""

    def __post_init__(self) -> None:
        check_least("drafter", self, layers=1, block_size=1, taps=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DFlashRecipe(DrafterRecipe):
    """One training run of a DFlash drafter."""

    kind: ClassVar[str] = "dflash"
    about: ClassVar[str] = "the DFlash network, whose files other runtimes read (sections drafter and loss)"
    trainer: ClassVar[str] = "dflash:train_dflash"

    drafter: DFlashShape = field(default_factory=DFlashShape)  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen
