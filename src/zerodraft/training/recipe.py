"""What a training run is: one frozen dataclass tree, read from YAML and from command-line flags alike.

Every value that changes the result of a run is here, so a recipe and the data are enough to repeat it. Field
docstrings are the help texts of the command line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from zerodraft.common.errors import ZerodraftError, did_you_mean, why
from zerodraft.common.files import read_text, user_path
from zerodraft.training.strict import check_least, from_mapping

T = TypeVar("T")

MOST_VALUES = 100_000
LARGEST_SEED = (1 << 32) - 1  # of numpy

Weights = tuple[float, ...] | Literal["uniform", "linear"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecipe:
    """The model: from scratch (`family` and sizes) or from an existing one (`start`)."""

    kind: Literal["ztt", "plain"] = "ztt"
    """`ztt`: a Zero Token Transformer. `plain`: the transformers model of the family itself, for comparison."""
    start: str | None = None
    """Checkpoint to start from (path, hub id or short name); a plain model is converted. `finetune` needs it."""
    convert: Literal["deepen", "compress"] = "deepen"
    """How a plain `start` becomes a ZTT: the same weights with more cycles, or fewer weights at the same depth."""
    init: Literal["stepwise", "average", "svd"] = "stepwise"
    """`compress`: where the shared weights come from."""
    family: str = "llama"
    """Model type of the base family, as in transformers (llama, qwen3, ...)."""
    hidden_size: int = 256
    """Width."""
    intermediate_size: int = 704
    """Width inside the feed-forward block."""
    num_hidden_layers: int = 6
    """Stored layers: head + shared + tail."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 4
    """Key/value heads (fewer than query heads: grouped-query attention)."""
    head_dim: int = 64
    """Size of one head."""
    max_position_embeddings: int = 1024
    """Longest sequence the model is meant for."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output matrix."""
    base: dict[str, Any] = field(default_factory=dict)
    """Any other key of the family's config."""
    head_layers: int = 1
    """Unshared layers before the cycled block."""
    tail_layers: int = 1
    """Unshared layers after the cycled block."""
    cycles: int = 2
    """How often the shared block runs."""
    schedule: Literal["block", "layer"] = "block"
    """Order of the cycled layers: 2345 2345 (block) or 22 33 44 55 (layer)."""
    zero_tokens: bool = True
    """Trainable zero tokens in the cycled layers."""
    ztt: dict[str, Any] = field(default_factory=dict)
    """Any other key of ZttConfig (input_injection, residual_streams, cycle_scales, zero_rope, cycle_gates, ...)."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        check_least("model", self, **dict.fromkeys((*sizes, "head_dim", "max_position_embeddings"), 1))

    @property
    def shared_layers(self) -> int:
        """Stored layers between head and tail."""
        return self.num_hidden_layers - self.head_layers - self.tail_layers

    @property
    def depth(self) -> int:
        """Layers of the unrolled model."""
        repeated = self.cycles - 1 if self.kind == "ztt" else 0
        return self.num_hidden_layers + repeated * self.shared_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecipe:
    """The tokenizer of a from-scratch run; a run with `model.start` uses that model's own."""

    path: str | None = None
    """Load this tokenizer instead of training one."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE, special tokens included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecipe:
    """Where the text comes from and how it becomes blocks of tokens."""

    train: tuple[str, ...] = ()
    """Files, folders, globs (.txt, .jsonl, .parquet) or `hub:NAME`; $VARIABLES are expanded."""
    validation: tuple[str, ...] = ()
    """Text to validate on; when empty, a share of the training documents is held out."""
    validation_fraction: float = 0.01
    """Share of documents held out when `validation` is empty; chosen by a hash of each document."""
    evaluation: dict[str, str] = field(default_factory=dict)
    """Further texts, by name, whose perplexity is measured at the end."""
    text_field: str = "text"
    """Field that holds the text in JSONL, parquet and hub data."""
    template: str | None = None
    """Builds the text from several fields, such as "{instruction}\\n{output}"; replaces `text_field`."""
    completion_only_loss: bool = True
    """Learn only what the assistant says in rows of `messages`, and the completion in rows of `prompt` and
    `completion`."""
    separator: str | None = None
    """Splits a text file into documents, such as "\\n\\n\\n"; without it a file is one document."""
    document_chars: int = 20000
    """Longer documents are cut into pieces of about this length, between paragraphs."""
    context_length: int = 256
    """Tokens in a training block."""
    validation_blocks: int = 128
    """At most this many blocks are used in each evaluation; 0 means all."""
    cache: str | None = None
    """Folder for tokenized data, one sub-folder per content hash; null stands for `$ZERODRAFT_CACHE`, else `zerodraft`
    in the platform's cache directory."""
    hub_split: str = "train"
    """Split to take of hub data sets."""

    def __post_init__(self) -> None:
        # a block of one token has nothing to predict
        check_least("data", self, document_chars=1, context_length=2, validation_blocks=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRecipe:
    """What is minimised over the cycles."""

    kind: Literal["last", "weighted", "sampled"] = "last"
    """`last` cycle only; `weighted` mean over all exits; `sampled`: a random number of cycles per step."""
    weights: Weights = "uniform"
    """Weight (`weighted`) or probability (`sampled`) of each cycle: a list, `uniform` or `linear` (1, 2, 3...)."""
    token_depths: float = 0.0
    """`sampled`: share of the steps that draw a depth for every token, as at inference with an exit rule."""
    cycles_from: tuple[float, ...] = ()
    """Share of the training from which on each cycle but the first runs, such as 0.4 0.65; empty: all at once."""
    exits_from: float = 0.0
    """`weighted`, `sampled`: share of the training until which only the last cycle's loss counts."""
    exit_targets: Literal["labels", "last"] = "labels"
    """`weighted`: what exits before the last cycle learn, the text's tokens or the last cycle's own distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRecipe:
    """Optimisation."""

    steps: int = 1000
    """Optimizer steps."""
    max_minutes: float = 0.0
    """End after this time if the steps take longer, with the decay moved forward; 0: no limit, and repeatable runs."""
    batch_size: int = 8
    """Blocks per forward pass and process."""
    accumulation: int = 1
    """Forward passes per optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices inside the layers, AdamW for everything else."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    muon_learning_rate: float = 0.0
    """Peak learning rate of the Muon matrices; 0 means the same as `learning_rate`."""
    shared_learning_rate_factor: float = 1.0
    """Multiplies the learning rate of the cycled layers' matrices, which collect gradients from every cycle."""
    ztt_learning_rate: float = 0.0
    """Peak learning rate of zero tokens, gates, injection, scales and streams; 0 means the same as `learning_rate`."""
    schedule: Literal["cosine", "wsd", "constant"] = "wsd"
    """After the warm-up: cosine decay, a plateau with a linear decay at the end, or a plateau."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_fraction: float = 0.3
    """`wsd`: share of the steps that the final decay takes."""
    final_scale: float = 0.05
    """Learning rate at the end as a share of the peak."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms, embeddings, zero tokens, gates, injection, scales and streams have none."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped here."""
    bf16: bool = False
    """bfloat16 autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """torch.compile the model."""
    log_every: int = 10
    """Steps between progress logs."""
    eval_every: int = 0
    """Steps between evaluations; 0 means only at the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 means none before the end."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    fsdp: bool = False
    """Shard over the processes of `accelerate launch` with FSDP2."""
    use_cpu: bool = False
    """Train on the CPU even if there is an accelerator."""
    tensorboard: bool = True
    """Write TensorBoard logs if tensorboard is installed."""
    report_to: tuple[str, ...] = ()
    """Report to these too, by transformers' names (wandb, mlflow, ...); the package must be installed."""

    def __post_init__(self) -> None:
        counts = {"steps": 1, "batch_size": 1, "accumulation": 1, "log_every": 1, "keep_checkpoints": 1}
        zero_or_more = ("max_minutes", "warmup_steps", "eval_every", "save_every", "max_grad_norm")
        check_least("training", self, **counts, **dict.fromkeys(zero_or_more, 0))
        for name in ("learning_rate", "shared_learning_rate_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ZerodraftError(f"training.{name} is {getattr(self, name)}; it must be a number above 0")
        for name in ("muon_learning_rate", "ztt_learning_rate", "weight_decay", "final_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ZerodraftError(f"training.{name} is {getattr(self, name)}; it must be a number of at least 0")
        if not 0 <= self.decay_fraction <= 1:
            raise ZerodraftError(f"training.decay_fraction is {self.decay_fraction}; it must be a share from 0 to 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ZerodraftError(
                f"training.betas is {list(self.betas)}; it must be two numbers from 0 to below 1, such as 0.9 0.95"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftRecipe:
    """LoRA adapters (needs the `peft` extra)."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 16.0
    """Scale of the adapters."""
    dropout: float = 0.0
    """Dropout in the adapters."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear modules that get adapters; empty means all of them."""

    def __post_init__(self) -> None:
        check_least("peft", self, rank=0)
        if not 0 <= self.dropout < 1:
            raise ZerodraftError(f"peft.dropout is {self.dropout}; it must be a share from 0 to below 1")
        if not abs(self.alpha) < math.inf:
            raise ZerodraftError(f"peft.alpha is {self.alpha}; it must be a finite number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run."""

    output: str
    """Folder for checkpoints, logs, the final model (`model/`) and `results.json`."""
    seed: int = 0
    """Seeds the weights, the order of the data and the sampled cycles."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    peft: PeftRecipe = field(default_factory=PeftRecipe)

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ZerodraftError(f"seed is {self.seed}; it must be from 0 to {LARGEST_SEED}")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Reads a YAML recipe.

    A file may start from another one next to it: `extends: other.yaml`; its own keys win.

    Args:
        path: the file.
        overrides: dotted keys, as a mapping or as `"training.steps=10"` strings whose values are YAML.

    Raises:
        ZerodraftError: no such file, not YAML, unknown keys or values of the wrong type.
    """
    return read_recipe(Recipe, path, overrides)


def read_recipe(cls: type[T], path: str | os.PathLike[str] | None, overrides: Sequence[str] | Mapping[str, Any]) -> T:
    """Any dataclass from a YAML file (or none) and dotted keys that win over it; errors as in `load_recipe`."""
    mapping = _read(user_path(path)) if path is not None else {}
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_split_override(text) for text in overrides]
    for dotted, value in pairs:
        _set(mapping, dotted, value)
    return from_mapping(cls, mapping)


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file and in those that it extends; `below`: the files that extend this one."""
    if not path.exists():
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ZerodraftError(f"no recipe at '{path}'" + (did_you_mean(path.name, near) if near else ""))
    mapping = parse_yaml(read_text(path, "recipe"), f"'{path}'")
    if not isinstance(mapping, dict):
        raise ZerodraftError(f"'{path}' must hold a mapping of keys to values")
    if "extends" not in mapping:
        return mapping
    other, chain = path.parent / str(mapping.pop("extends")), (*below, path)
    if other.resolve() in [file.resolve() for file in chain]:
        if len(chain) == 1:
            raise ZerodraftError(f"'{path}' extends itself")
        names = ", which extends ".join(f"'{file}'" for file in (*chain[1:], other))
        raise ZerodraftError(f"'{chain[0]}' extends {names}: one of them must stand by itself")
    return merge(_read(other, chain), mapping)


def parse_yaml(text: str, what: str) -> Any:
    """What a YAML text says; it may come from a stranger, and the parser lets through whatever Python raises."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ZerodraftError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ZerodraftError(f"{what} is not valid YAML: {why(error)}") from error
    # a few aliases of aliases are more values than any memory holds, or never end
    count, left = 0, [value]
    while left:
        item = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise ZerodraftError(f"{what} has more than {MOST_VALUES:,} values: no recipe is that long")
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, (list, tuple, set)):
            left += item
    return value


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one, section by section; where both have a value `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ZerodraftError(f"override '{text}' must look like key=value")
    return key, parse_yaml(value, f"override '{key}'")


def _set(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise ZerodraftError(f"override '{dotted}': '{parent}' is not a section")
    mapping[last] = value
