"""`train_drafter`: a target and its completions in, a block drafter with its log and results out."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import TrainerCallback

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.block_model import BlockDrafterModel, drafter_from_target
from zerodraft.models.loading import load_pretrained
from zerodraft.training.drafters.acceptance import Acceptance, measure_acceptance
from zerodraft.training.drafters.blocks import SHARES, Blocks, block_loss, collate, coupled_loss, draw_anchors
from zerodraft.training.drafters.completions import Completions
from zerodraft.training.drafters.features import FeatureCache, Features, FreshFeatures
from zerodraft.training.drafters.recipe import BlockLossRecipe, DrafterRecipe
from zerodraft.training.drafters.run import HeldBackTrainer, prepared


class DrafterTrainer(HeldBackTrainer):
    """Trains a `BlockDrafterModel` on what its target saw and wrote.

    Args:
        block_loss: labels, and weights of the slots.
        features: the target's hidden states; the last tap is its final state.
        embedding: the target's input embedding.
        head: the rows of the target's LM head that belong to the draft vocabulary.
        **kwargs: of `HeldBackTrainer`.
    """

    def __init__(
        self,
        *,
        block_loss: BlockLossRecipe,
        features: Features,
        embedding: Float[Tensor, "V H"],
        head: Float[Tensor, "v H"],
        **kwargs: Any,
    ) -> None:
        self.block_loss, self.features, self.embedding = block_loss, features, embedding
        super().__init__(data_collator=self.draw_blocks, **kwargs)
        device = self.args.device
        self.head = head.to(device)
        drafter: Any = self.model
        self.draft_index = torch.full((len(embedding),), -1, device=device)
        self.draft_index[drafter.draft_ids] = torch.arange(len(head), device=device)

    def draw_blocks(self, examples: list[dict[str, int]]) -> dict[str, Tensor]:
        """A batch with random blocks in the given sequences."""
        indices = [example["index"] for example in examples]
        drafter: Any = self.model
        count, copied = self.block_loss.anchors, self.block_loss.copied
        anchors = [draw_anchors(self.features, e["index"], count, e["seed"], copied) for e in examples]
        blocks = collate(self.features, indices, anchors, drafter.config.block_size)
        return {
            "taps": blocks.taps, "kept": blocks.kept, "tokens": blocks.tokens,
            "anchors": blocks.anchors, "is_label": blocks.is_label,
        }  # fmt: skip

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one batch of blocks."""
        # accelerate's own reaches no further than the network, and the LM head is a third of the work
        with self.accelerator.autocast():
            loss, hidden = self._loss(model, Blocks(**inputs))
        return (loss, hidden) if return_outputs else loss

    def _loss(self, model: nn.Module, blocks: Blocks) -> tuple[Tensor, Tensor]:
        hidden = model(blocks.taps[:, :, :-1], blocks.kept, blocks.anchors, self._embed(blocks.newest))
        logits = hidden @ self.head.T
        soft = SHARES[self.block_loss.label][1] > 0
        goal = (
            blocks.target_states @ self.head.T if soft else None,
            self.draft_index[blocks.labels],
            blocks.is_label,
            self.block_loss.label,
            self.block_loss.decay,
        )
        loss = block_loss(logits, *goal)
        drafter: Any = self.accelerator.unwrap_model(model)
        if drafter.coupling is not None:
            coupled = drafter.coupled(hidden, self._embed(blocks.previous))
            loss = loss + coupled_loss(coupled, logits, self.head, *goal)
        return loss, hidden

    def _embed(self, ids: Int[Tensor, "*s"]) -> Float[Tensor, "*s H"]:
        return self.embedding[ids.to(self.embedding.device)].to(ids.device)

    def measure(self, indices: Sequence[int]) -> Acceptance:
        """Acceptance on the given completions."""
        drafter: Any = self.accelerator.unwrap_model(self.model)
        drafter.eval()
        acceptance = measure_acceptance(drafter, self.features, indices, self.embedding, self.head)
        drafter.train()
        return acceptance


def train_drafter(
    recipe: DrafterRecipe,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] | None = None,
    build: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Trains a block drafter for a target, or another network that is called as `BlockDrafterModel` is.

    Args:
        recipe: the whole run.
        resume: continue from the last checkpoint in `recipe.out`.
        callbacks: instead of the progress bar.
        build: makes the other network from the recipe, the target, the completions and the numbers of those to use.

    Returns:
        What is written to `results.json`: acceptance, speed, sizes, and what is needed to repeat the run.

    Raises:
        ZerodraftError: recipe, target and completions do not fit, the folder holds another run, or the loss is not
            finite.
    """
    with prepared(recipe, resume) as run:
        drafter = (build or _drafter)(recipe, run.target, run.completions, run.train)
        taps = [*drafter.config.layers, run.target.config.get_text_config().num_hidden_layers]
        features: Features
        if recipe.recompute:
            features = FreshFeatures(run.target, run.completions, taps, bf16=recipe.training.bf16)
            # states are on the device already
            run.arguments.dataloader_pin_memory = False
        else:
            features = FeatureCache(run.target, run.completions, taps, Path(recipe.cache or run.folder / "features"))
        if recipe.cached_only:
            assert isinstance(features, FeatureCache)
            run.train = [i for i in run.train if i in features]
            if len(run.train) < recipe.training.batch_size:
                raise ZerodraftError(
                    f"cached_only is set, but the hidden states of only {len(run.train)} completions are in "
                    f"'{features.folder}': give the cache of an earlier run, or leave cached_only out."
                )
        return run.go(
            DrafterTrainer,
            drafter,
            recipe.loss.anchors,
            callbacks,
            block_loss=recipe.loss,
            features=features,
            embedding=run.target.get_input_embeddings().weight.detach(),
            head=run.target.get_output_embeddings().weight.detach()[drafter.draft_ids].contiguous(),
        )


def frequent_tokens(completions: Completions, indices: Sequence[int], size: int, vocabulary: int) -> Int[Tensor, "v"]:
    """The `size` most frequent tokens of some completions, in rising order."""
    counts = np.zeros(vocabulary, np.int64)
    for i in indices:
        tokens, prompt_length = completions[i]
        counts += np.bincount(tokens[prompt_length:], minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def _drafter(recipe: DrafterRecipe, target: Any, completions: Completions, train: Sequence[int]) -> BlockDrafterModel:
    if recipe.drafter.start is not None:
        return _continued(recipe)
    vocabulary = target.get_output_embeddings().weight.shape[0]
    size = recipe.drafter.draft_vocab
    draft_ids = frequent_tokens(completions, train, size or vocabulary, vocabulary)
    return drafter_from_target(
        target,
        recipe.drafter.layers,
        recipe.drafter.block_size,
        draft_ids if 0 < size < vocabulary else None,
        recipe.drafter.coupling,
    )


def _continued(recipe: DrafterRecipe) -> BlockDrafterModel:
    """The drafter that the recipe starts from, with a new coupling if it had none, and only as many slots as wanted."""
    assert recipe.drafter.start is not None
    old = load_pretrained(BlockDrafterModel, recipe.drafter.start, dtype=torch.float32)
    assert isinstance(old, BlockDrafterModel)
    config: Any = copy.deepcopy(old.config)
    config.coupling = config.coupling or recipe.drafter.coupling
    config.block_size = min(config.block_size, recipe.drafter.block_size)
    drafter = BlockDrafterModel(config)
    weights = old.state_dict()
    for name in ("slots.weight", "slots.bias"):
        weights[name] = weights[name][: drafter.slots.out_features]
    drafter.load_state_dict(weights, strict=False)
    return drafter
