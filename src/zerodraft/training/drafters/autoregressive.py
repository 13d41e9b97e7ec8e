"""`train_autoregressive`: some of a target's own layers become a small causal language model that drafts for it.

Layers and final norm learn the target's completions, which is distillation by sequences (arXiv 1606.07947). Embeddings
and head stay the target's: completions hold too few of the tokens. What is saved is an ordinary model of the target's
family with the target's tokenizer, so whatever takes a draft model takes this one.

Legend: B sequences, T tokens, P positions that are learned from.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.drafters.taking import Take, layers_to_take
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.drafters.autoregressive_recipe import AutoregressiveDrafterRecipe, AutoregressiveRecipe
from zerodraft.training.drafters.completions import Completions, check_vocabulary
from zerodraft.training.drafters.run import HeldBackTrainer, prepared
from zerodraft.training.drafters.walk import WalkAcceptance, first_drafted, measure_walks, walk
from zerodraft.ztt.config import ZttConfig
from zerodraft.ztt.convert import restack, restack_weights
from zerodraft.ztt.families import layer_lists

IGNORED = -100
"""What `cross_entropy` takes for no token: rows with fewer positions are padded with it."""


def small_from_target(target: PreTrainedModel, num_layers: int = 4, take: Take = "spread") -> PreTrainedModel:
    """A causal language model of the target's family made of copies of some of its layers, its embeddings and its head.

    Args:
        target: a causal language model; not changed.
        num_layers: how many of its layers to take, 0 for all.
        take: the first ones, the last ones, or from the first to the last at even distances.

    Raises:
        ZerodraftError: the target has no list of layers to take from, or fewer layers.
    """
    config: Any = target.config
    plain = not isinstance(config, ZttConfig) and config.get_text_config() is config
    paths = layer_lists(target) if plain else []
    if len(paths) != 1:
        raise ZerodraftError(
            f"A '{config.model_type}' model cannot be made smaller by leaving layers out: expected a plain causal "
            "language model with one list of layers; train a block drafter instead (--kind block)."
        )
    chosen = layers_to_take(config.num_hidden_layers, num_layers, take)
    model = AutoModelForCausalLM.from_config(restack(config, chosen), dtype=target.dtype, trust_remote_code=False)
    model.load_state_dict(restack_weights(target.state_dict(), paths[0], chosen))
    model.generation_config = copy.deepcopy(target.generation_config)
    return model


def draw_places(length: int, prompt_length: int, count: int, dice: torch.Generator) -> Int[Tensor, " P"]:
    """Where `count` different tokens stand that decoding would draft; all of them if there are no more, or for 0."""
    first = first_drafted(prompt_length)
    return first + torch.randperm(length - first, generator=dice)[: count or None]


@contextmanager
def head_at(model: Any, at: Int[Tensor, "B P"]) -> Iterator[None]:
    """Inside, the model's head sees only the states at these positions, so that its logits are theirs."""
    rows = torch.arange(len(at), device=at.device)[:, None]
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][rows, at],))
    try:
        yield
    finally:
        hook.remove()


class AutoregressiveTrainer(HeldBackTrainer):
    """Trains a causal language model on completions.

    Args:
        autoregressive: how much of a completion is learned from and drafted at once.
        completions: the target's texts.
        vocab_size: the target's vocabulary.
        **kwargs: of `HeldBackTrainer`.
    """

    def __init__(
        self, *, autoregressive: AutoregressiveRecipe, completions: Completions, vocab_size: int, **kwargs: Any
    ) -> None:
        self.autoregressive, self.completions, self.vocab_size = autoregressive, completions, vocab_size
        super().__init__(data_collator=self.draw, **kwargs)

    def draw(self, examples: list[dict[str, int]]) -> dict[str, Tensor]:
        """A batch with random positions in the given sequences; padding is behind the texts, which do not see it."""
        ids, at, next_tokens = [], [], []
        for example in examples:
            array, prompt_length = self.completions[example["index"]]
            tokens, dice = torch.from_numpy(array), torch.Generator().manual_seed(example["seed"])
            places = draw_places(len(tokens), prompt_length, self.autoregressive.positions, dice)
            ids.append(tokens)
            at.append(places - 1)
            next_tokens.append(tokens[places])
        return {
            "ids": pad_sequence(ids, batch_first=True),
            "at": pad_sequence(at, batch_first=True),
            "next_tokens": pad_sequence(next_tokens, batch_first=True, padding_value=IGNORED),
        }

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Cross entropy of the tokens after the drawn positions, a mean over them."""
        with head_at(self.accelerator.unwrap_model(model), inputs["at"]):
            output = model(input_ids=inputs["ids"], use_cache=False)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), inputs["next_tokens"].flatten())
        return (loss, output) if return_outputs else loss

    def measure(self, indices: Sequence[int]) -> WalkAcceptance:
        """Acceptance on the given completions."""
        model: Any = self.accelerator.unwrap_model(self.model)
        k = self.autoregressive.block_size
        drafter = AutoregressiveDrafter(model.eval(), candidates=1, max_length=k, vocab_size=self.vocab_size)
        acceptance = measure_walks(partial(walk, drafter, k=k), self.completions, indices, k)
        model.train()
        return acceptance


def train_autoregressive(
    recipe: AutoregressiveDrafterRecipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] | None = None
) -> dict[str, Any]:
    """Trains a small causal model to draft for a target; arguments, result and errors as in `train_drafter`."""
    with prepared(recipe, resume) as run:
        run.tokenizer = load_tokenizer(resolve(recipe.target))
        model = _model(recipe.autoregressive, run.target)
        vocab_size = run.target.config.get_text_config().vocab_size
        # whether it can draft, and for this target
        AutoregressiveDrafter(model, vocab_size=vocab_size)
        check_vocabulary(run.completions, model.get_input_embeddings().weight.shape[0])
        for kept in (model.get_input_embeddings(), model.get_output_embeddings()):
            kept.requires_grad_(False)
        run.target = None  # its memory is needed no more
        options = {"autoregressive": recipe.autoregressive, "completions": run.completions, "vocab_size": vocab_size}
        return run.go(AutoregressiveTrainer, model, 1, callbacks, **options)


def _model(recipe: AutoregressiveRecipe, target: Any) -> Any:
    if recipe.start is None:
        return small_from_target(target, recipe.layers, recipe.take)
    return load_pretrained(AutoModelForCausalLM, resolve(recipe.start), dtype=torch.float32)
