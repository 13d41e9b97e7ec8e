"""What training a drafter is: one frozen dataclass a kind, read from YAML and from command-line flags alike.

Field docstrings are the help texts of the command line.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.recipe import TrainingRecipe
from zerodraft.training.strict import check_least

Label = Literal["tokens", "distribution", "both", "variation"]
"""What a drafter learns from: the target's tokens, its probabilities, or both; see `blocks.block_loss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRecipe:
    """The drafter's shape."""

    layers: int = 4
    """Drafter layers; they start as copies of the target's last ones."""
    block_size: int = 8
    """Slots of a block, the known token included: as many tokens are drafted at once. Of a drafter that is continued
    with fewer slots the first remain."""
    draft_vocab: int = 8192
    """Draft only the tokens that are most frequent in the completions; 0: the whole vocabulary."""
    coupling: int = 256
    """Width of the network that tells a slot which token the slot before it got; 0: none."""
    start: str | None = None
    """Continue from this drafter (a folder) instead of from the target's layers."""

    def __post_init__(self) -> None:
        check_least("drafter", self, layers=1, block_size=1, draft_vocab=0, coupling=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLossRecipe:
    """What is minimised over the slots."""

    label: Label = "tokens"
    """The completion's tokens, the target's whole distribution, or both; variation: 0.1 of cross entropy on tokens and
    0.9 of the total variation between drafter and target, the share of sampled drafts that is refused."""
    decay: float = 0.8
    """Slot j weighs decay to the power j."""
    anchors: int = 32
    """Blocks per sequence and step."""
    copied: int = 0
    """Skip places where this many tokens have occurred together before, since decoding copies there; 0: skip none."""

    def __post_init__(self) -> None:
        check_least("loss", self, anchors=1, copied=0)
        if not 0 < self.decay <= 1:
            raise ZerodraftError(f"loss.decay is {self.decay}; it must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBackRecipe:
    """Completions that are not trained on."""

    sequences: int = 40
    """How many greedy completions are kept back."""
    measured: int = 16
    """How many of them an evaluation during training judges; the end judges all."""

    def __post_init__(self) -> None:
        check_least("held_back", self, sequences=1, measured=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTrainingRecipe(TrainingRecipe):
    """Optimisation, with defaults for a drafter."""

    steps: int = 4000
    """Optimizer steps."""
    batch_size: int = 2
    """Sequences per forward pass and process."""
    weight_decay: float = 0.01
    """Weight decay of matrices; norms and slots have none."""
    eval_every: int = 500
    """Steps between measurements of the acceptance length; 0 means only at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0 means none before the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptingRecipe(BlockTrainingRecipe):
    """Optimisation, with defaults for adapting a trained model."""

    learning_rate: float = 3e-4
    """Peak learning rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionsRecipe:
    """What every training run on a target's completions has; each kind of drafter is a sub-class (see `kinds.py`).

    Attributes:
        kind: The name of the kind in `drafters.kinds`.
        about: What it is, for the help.
        trainer: The function that trains it, as `module:function` of this room; imported late, since it needs torch.
    """

    kind: ClassVar[str]
    about: ClassVar[str]
    trainer: ClassVar[str]

    target: str = field(metadata={"also": ("model",)})
    """The model to draft for: a folder, a hub id or a short name such as smollm2."""
    data: tuple[str, ...]
    """Folders or files of completions, as `zerodraft distill` writes them; $VARIABLES are expanded."""
    out: str
    """Folder for checkpoints, logs, the drafter (`model/`) and `results.json`."""
    seed: int = 0
    """Seeds the order of the data, the places that are learned from and what is held back."""
    held_back: HeldBackRecipe = field(default_factory=HeldBackRecipe)
    training: BlockTrainingRecipe = field(default_factory=BlockTrainingRecipe)

    def train(self, *, resume: bool = False, callbacks: Any = None) -> dict[str, Any]:
        """Trains the drafter; arguments, result and errors as in `block.train_drafter`."""
        module, _, function = self.trainer.partition(":")
        train = getattr(import_module(f"zerodraft.training.drafters.{module}"), function)
        return train(self, resume=resume, callbacks=callbacks)


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterRecipe(CompletionsRecipe):
    """One training run of a block drafter."""

    kind: ClassVar[str] = "block"
    about: ClassVar[str] = "a few layers that read the target's hidden states (sections drafter and loss)"
    trainer: ClassVar[str] = "block:train_drafter"

    cache: str | None = None
    """Folder for the target's hidden states (some GB); the default is `features` in the output folder."""
    cached_only: bool = False
    """Train only on completions whose hidden states an earlier run left in `cache`, instead of computing more."""
    recompute: bool = False
    """Compute the target's hidden states anew for every batch and store none: for a GPU, and for many completions."""
    drafter: BlockRecipe = field(default_factory=BlockRecipe)
    loss: BlockLossRecipe = field(default_factory=BlockLossRecipe)

    def __post_init__(self) -> None:
        if self.recompute and (self.cached_only or self.cache):
            raise ZerodraftError("recompute stores no hidden states: leave out cache and cached_only, or recompute.")
