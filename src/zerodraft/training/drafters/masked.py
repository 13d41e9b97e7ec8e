"""`train_masked`: a target's own layers become a masked diffusion language model that drafts for it.

The idea is that of Dream, which was made from Qwen2.5: start from the causal model's weights, take its mask of
attention away, hide tokens, and let the shifted logits name them. What is hidden is the recipe's choice
(`masked_recipe`): a random share of the completion, with the weight 1/t of the diffusion bound, or blocks at the end of
a text as in decoding.

Legend: B sequences, T tokens of a pass (masks included), P predicted positions, k masks of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import TrainerCallback

from zerodraft.drafters.masked import MaskedDrafter, token_log_q
from zerodraft.drafters.masked_formats import load_masked
from zerodraft.drafters.masked_model import MaskedModel, masked_from_target
from zerodraft.models.resolve import resolve
from zerodraft.training.drafters.completions import Completions
from zerodraft.training.drafters.masked_recipe import MaskedDrafterRecipe, MaskedRecipe
from zerodraft.training.drafters.run import HeldBackTrainer, prepared
from zerodraft.training.drafters.walk import WalkAcceptance, first_drafted, measure_walks, walk

SMALLEST_SHARE = 0.05
"""Smaller shares of masked tokens would have enormous weights."""

CHUNK = 32
"""Drafts judged in one pass."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence with masks: who sees whom, and which states predict what with which weight (together about 1)."""

    ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    visible: Bool[Tensor, "T T"]
    at: Int[Tensor, " P"]
    labels: Int[Tensor, " P"]
    weights: Float[Tensor, " P"]


def ratio_example(
    tokens: Int[Tensor, " n"], prompt_length: int, mask_id: int, shifted: bool, dice: torch.Generator
) -> Example:
    """A share t of the completion masked, t uniform; each masked token weighs 1/t over the completion's length."""
    n = len(tokens)
    # the very first state has nothing before it that could predict it
    first = max(prompt_length, 1)
    share = SMALLEST_SHARE + (1 - SMALLEST_SHARE) * float(torch.rand((), generator=dice))
    hidden = torch.rand(n - first, generator=dice) < share
    hidden[torch.randint(n - first, (1,), generator=dice)] = True
    places = first + hidden.nonzero()[:, 0]
    ids = tokens.clone()
    ids[places] = mask_id
    weights = torch.full((len(places),), 1 / (share * (n - first)))
    visible = torch.ones(n, n, dtype=torch.bool)
    return Example(ids, torch.arange(n), visible, places - int(shifted), tokens[places], weights)


def block_example(tokens: Int[Tensor, " n"], start: int, k: int, mask_id: int, shifted: bool, decay: float) -> Example:
    """The first `start` tokens and k masks, all of which see each other; labels as far as the text goes."""
    ids = torch.cat([tokens[:start], tokens.new_full((k,), mask_id)])
    labels = tokens[start : start + k]
    weights = decay ** torch.arange(len(labels))
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool)
    at = start - int(shifted) + torch.arange(len(labels))
    return Example(ids, torch.arange(len(ids)), visible, at, labels, weights / weights.sum())


def blocks_example(
    tokens: Int[Tensor, " n"], starts: Int[Tensor, " A"], k: int, mask_id: int, shifted: bool, decay: float
) -> Example:
    """The whole text, causal, and behind it a block of k masks for each of `starts`, which sees the text before its
    start and itself."""
    n, count = len(tokens), len(starts)
    slots = torch.arange(k)
    ids = torch.cat([tokens, tokens.new_full((count * k,), mask_id)])
    positions = torch.cat([torch.arange(n), (starts[:, None] + slots).flatten()])
    block = torch.cat([torch.full((n,), -1), torch.arange(count).repeat_interleave(k)])
    # text: what stands at or before the token, or before the block
    last = torch.cat([torch.arange(n), (starts - 1).repeat_interleave(k)])
    visible = (block == -1) & (positions <= last[:, None]) | (block >= 0) & (block == block[:, None])
    places = starts[:, None] + slots
    at = n + torch.arange(count * k).view(count, k) - int(shifted)
    if shifted:
        at[:, 0] = starts - 1
    inside = places < n
    weights = decay**slots * inside
    weights = weights / weights.sum(1, keepdim=True) / count
    return Example(ids, positions, visible, at[inside], tokens[places[inside]], weights[inside])


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch; what pads it is seen by nobody and weighs nothing."""
    length, predicted = max(len(e.ids) for e in examples), max(len(e.at) for e in examples)
    batch: dict[str, list[Tensor]] = {name: [] for name in ("ids", "positions", "visible", "at", "labels", "weights")}
    for e in examples:
        more, fewer = length - len(e.ids), predicted - len(e.at)
        visible = F.pad(e.visible, (0, more, 0, more))
        # a row of padding sees something, so that its attention is a number
        visible[len(e.ids) :, 0] = True
        for name, value in (("ids", e.ids), ("positions", e.positions)):
            batch[name].append(F.pad(value, (0, more)))
        batch["visible"].append(visible[None])
        for name, value in (("at", e.at), ("labels", e.labels), ("weights", e.weights)):
            batch[name].append(F.pad(value, (0, fewer)))
    return {name: torch.stack(values) for name, values in batch.items()}


def masked_loss(
    logits: Float[Tensor, "B P V"], labels: Int[Tensor, "B P"], weights: Float[Tensor, "B P"]
) -> Float[Tensor, ""]:
    """Weighted cross entropy, a mean over the sequences."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / len(labels)


def measure_masked(drafter: MaskedDrafter, completions: Completions, indices: Sequence[int], k: int) -> WalkAcceptance:
    """Acceptance over greedy completions. Where the known tokens are causal all drafts of a text are made together,
    else one after another."""
    together = drafter.model.config.causal_prefix and drafter.steps == 1
    return measure_walks(partial(walk_together if together else walk, drafter, k=k), completions, indices, k)


def walk_together(drafter: MaskedDrafter, tokens: Int[Tensor, " n"], known: int, k: int) -> list[int]:
    """What `walk` does, by judging the drafts from every place of the text, many in a pass."""
    model, n = drafter.model, len(tokens)
    lengths: list[int] = []
    for starts in torch.arange(known, n).split(CHUNK):
        e = blocks_example(tokens, starts, k, model.config.mask_token_id, model.config.shifted, 1.0)
        ids, positions, visible = (x.to(model.device) for x in (e.ids, e.positions, e.visible))
        states = model(ids[None], positions[None], visible[None, None])[0, e.at.to(model.device)]
        right = torch.zeros(len(starts), k, dtype=torch.bool)
        right[starts[:, None] + torch.arange(k) < n] = (
            token_log_q(model, states, drafter.vocab_size).argmax(-1).cpu() == e.labels
        )
        lengths += right.int().cumprod(1).sum(1).tolist()
    accepted, at = [], known
    while at < n:
        accepted.append(lengths[at - known])
        at += accepted[-1] + 1
    return accepted


class MaskedTrainer(HeldBackTrainer):
    """Trains a `MaskedModel` on completions.

    Args:
        masked: what is masked.
        completions: the target's texts.
        vocab_size: the target's vocabulary.
        **kwargs: of `HeldBackTrainer`.
    """

    def __init__(
        self,
        *,
        masked: MaskedRecipe,
        completions: Completions,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        self.masked, self.completions, self.vocab_size = masked, completions, vocab_size
        super().__init__(data_collator=self.draw, **kwargs)

    def draw(self, examples: list[dict[str, int]]) -> dict[str, Tensor]:
        """A batch with random masks in the given sequences."""
        return collate([self._example(example["index"], example["seed"]) for example in examples])

    def _example(self, index: int, seed: int) -> Example:
        recipe, model = self.masked, self.model
        config: Any = model.config  # pyright: ignore[reportOptionalMemberAccess]  # the Trainer always has one
        array, prompt_length = self.completions[index]
        tokens, dice = torch.from_numpy(array), torch.Generator().manual_seed(seed)
        if recipe.masking == "ratio":
            return ratio_example(tokens, prompt_length, config.mask_token_id, config.shifted, dice)
        first = first_drafted(prompt_length)
        count = recipe.blocks if recipe.masking == "blocks" else 1
        starts = first + torch.randperm(len(tokens) - first, generator=dice)[:count]
        how = (recipe.block_size, config.mask_token_id, config.shifted, recipe.decay)
        if recipe.masking == "block":
            return block_example(tokens, int(starts[0]), *how)
        return blocks_example(tokens, starts, *how)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one batch; the head sees only the states that predict something."""
        states = model(inputs["ids"], inputs["positions"], inputs["visible"])
        rows = torch.arange(len(states), device=states.device)[:, None]
        own: Any = self.accelerator.unwrap_model(model)
        loss = masked_loss(own.lm_head(states[rows, inputs["at"]]), inputs["labels"], inputs["weights"])
        return (loss, states) if return_outputs else loss

    def measure(self, indices: Sequence[int]) -> WalkAcceptance:
        """Acceptance on the given completions."""
        model: Any = self.accelerator.unwrap_model(self.model)
        drafter = MaskedDrafter(model, vocab_size=self.vocab_size, candidates=1, max_length=self.masked.block_size)
        acceptance = measure_masked(drafter, self.completions, indices, self.masked.block_size)
        model.train()
        return acceptance


def train_masked(
    recipe: MaskedDrafterRecipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] | None = None
) -> dict[str, Any]:
    """Trains a masked diffusion drafter for a target; arguments, result and errors as in `train_drafter`."""
    with prepared(recipe, resume) as run:
        model = _model(recipe.masked, run.target)
        vocab_size = run.target.config.get_text_config().vocab_size
        run.target = None  # its memory is needed no more
        blocks = recipe.masked.blocks if recipe.masked.masking == "blocks" else 1
        options = {"masked": recipe.masked, "completions": run.completions, "vocab_size": vocab_size}
        return run.go(MaskedTrainer, model, blocks, callbacks, **options)


def _model(recipe: MaskedRecipe, target: Any) -> MaskedModel:
    size = 0 if recipe.masking == "ratio" else recipe.block_size
    causal = recipe.masking == "blocks"
    if recipe.start is None:
        return masked_from_target(target, recipe.layers, recipe.take, block_size=size, causal_prefix=causal)
    model = load_masked(resolve(recipe.start), torch.float32)
    model.config.block_size, model.config.causal_prefix = size, causal
    # whether the vocabularies fit
    MaskedDrafter(model, vocab_size=target.config.get_text_config().vocab_size)
    return model
