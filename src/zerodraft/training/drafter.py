"""`train_drafter`: a target and its completions in, a block drafter with its log and results out.

The folder of a run is that of `pretrain`: `recipe.json`, `log.jsonl` (every step), `checkpoint-N/`, and at the end
`model/` and `results.json`.
"""

import copy
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from zerodraft.drafters.block_model import BlockDrafterModel, drafter_from_target
from zerodraft.errors import ZerodraftError
from zerodraft.targets.resolve import resolve
from zerodraft.training.acceptance import Acceptance, measure_acceptance
from zerodraft.training.base import RecipeTrainer, training_arguments
from zerodraft.training.blocks import Blocks, block_loss, collate, coupled_loss, draw_anchors
from zerodraft.training.callbacks import ProgressBar
from zerodraft.training.completions import Completions, read_completions
from zerodraft.training.drafter_recipe import BlockLossRecipe, DrafterRecipe
from zerodraft.training.features import FeatureCache
from zerodraft.training.run import check_folder, provenance, save_model, start_folder, write_json
from zerodraft.ztt.loading import load_pretrained

SHORTEST = 12
"""Completions of fewer tokens are left out."""


class DrafterTrainer(RecipeTrainer):
    """Trains a `BlockDrafterModel` on what its target saw and wrote.

    Args:
        block_loss: labels, and weights of the slots.
        features: the target's hidden states; the last tap is its final state.
        held_back: completions to measure the acceptance length on.
        measured: how many of them to judge during training.
        embedding: the target's input embedding.
        head: the rows of the target's LM head that belong to the draft vocabulary.
        **kwargs: of `RecipeTrainer`.
    """

    def __init__(
        self,
        *,
        block_loss: BlockLossRecipe,
        features: FeatureCache,
        held_back: Sequence[int],
        measured: int,
        embedding: Float[Tensor, "V H"],
        head: Float[Tensor, "v H"],
        **kwargs: Any,
    ) -> None:
        self.block_loss, self.features, self.embedding = block_loss, features, embedding
        self.held_back, self.measured = list(held_back), measured
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
        anchors = [draw_anchors(self.features, e["index"], self.block_loss.anchors, e["seed"]) for e in examples]
        blocks = collate(self.features, indices, anchors, drafter.config.block_size)
        return {
            "taps": blocks.taps, "kept": blocks.kept, "tokens": blocks.tokens,
            "anchors": blocks.anchors, "is_label": blocks.is_label,
        }  # fmt: skip

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of one batch of blocks."""
        blocks = Blocks(**inputs)
        hidden = model(blocks.taps[:, :, :-1], blocks.kept, blocks.anchors, self._embed(blocks.newest))
        logits = hidden @ self.head.T
        soft = self.block_loss.label != "tokens"
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
        return (loss, hidden) if return_outputs else loss

    def _embed(self, ids: Int[Tensor, "*s"]) -> Float[Tensor, "*s H"]:
        return self.embedding[ids.to(self.embedding.device)].to(ids.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean accepted tokens and acceptance by position on some held-back completions."""
        metrics = acceptance_metrics(self.measure(self.held_back[: self.measured]))
        self.log(dict(metrics))
        if self.json_log is not None:
            self.json_log.write(step=self.state.global_step, **metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[arg-type]  # HF type
        return metrics

    def measure(self, indices: Sequence[int]) -> Acceptance:
        """Acceptance on the given completions."""
        drafter: Any = self.accelerator.unwrap_model(self.model)
        drafter.eval()
        acceptance = measure_acceptance(drafter, self.features, indices, self.embedding, self.head)
        drafter.train()
        return acceptance


def acceptance_metrics(acceptance: Acceptance) -> dict[str, float]:
    """Flat figures for logs."""
    by_position = {f"eval_accepted_{j}": float(share) for j, share in enumerate(acceptance.by_position, 1)}
    return {"eval_mat": acceptance.mat, **by_position}


class Sequences(torch.utils.data.Dataset[dict[str, int]]):
    """Numbers of the sequences to train on, and a seed for the places of their blocks; the collator looks them up.

    Seeds follow from the pass over the data, not from a random state: a resumed run could not restore one while batches
    are fetched ahead.
    """

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        self.indices, self.seed, self.epoch = list(indices), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, int]:
        index = self.indices[i]
        return {
            "index": index,
            "seed": int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0]),
        }


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
    folder = Path(recipe.out)
    checkpoint = check_folder(folder, recipe, resume)
    completions = read_completions([os.path.expandvars(path) for path in recipe.data])
    target: Any = AutoModelForCausalLM.from_pretrained(resolve(recipe.target), dtype=torch.float32).eval()
    train, held_back = split_completions(completions, recipe.held_back.sequences, recipe.seed)
    set_seed(recipe.seed)
    drafter = (build or _drafter)(recipe, target, completions, train)
    taps = [*drafter.config.layers, target.config.get_text_config().num_hidden_layers]
    features = FeatureCache(target, completions, taps, Path(recipe.cache or folder / "features"))
    if recipe.cached_only:
        train = [i for i in train if i in features]
        if len(train) < recipe.training.batch_size:
            raise ZerodraftError(
                f"cached_only is set, but the hidden states of only {len(train)} completions are in "
                f"'{features.folder}': give the cache of an earlier run, or leave cached_only out."
            )

    arguments = training_arguments(recipe.training, str(folder), recipe.seed, report_to=[])
    resumed_step = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    log = start_folder(folder, recipe, resumed_step) if arguments.process_index == 0 else None
    embedding = target.get_input_embeddings().weight.detach()
    head = target.get_output_embeddings().weight.detach()[drafter.draft_ids].contiguous()
    blocks = recipe.training.batch_size * recipe.training.accumulation * arguments.world_size * recipe.loss.anchors
    trainer = DrafterTrainer(
        recipe=recipe.training,
        log=log,
        block_loss=recipe.loss,
        features=features,
        held_back=held_back,
        measured=recipe.held_back.measured,
        embedding=embedding,
        head=head,
        model=drafter,
        args=arguments,
        train_dataset=Sequences(train, recipe.seed),
        eval_dataset=Sequences(held_back, recipe.seed),
        callbacks=[ProgressBar(blocks, "blocks")] if callbacks is None else list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.write_losses()
    acceptance = trainer.measure(held_back)
    results = {
        "parameters": drafter.num_parameters(),
        "steps": trainer.state.global_step,
        "blocks": trainer.state.global_step * blocks,
        "seconds": seconds,
        "resumed_from": checkpoint and Path(checkpoint).name,
        "completions": {"sequences": len(train), "tokens": int(completions.lengths[train].sum())},
        "held_back": {"sequences": len(held_back), **{k: _plain(v) for k, v in asdict(acceptance).items()}},
        **provenance(recipe),
    }
    save_model(trainer, folder)
    if trainer.is_world_process_zero():
        write_json(folder / "results.json", results)
    return results


def split_completions(completions: Completions, held_back: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the sequences to train on, and of some greedy ones to measure on.

    Raises:
        ZerodraftError: too few sequences, or too few greedy ones.
    """
    usable = [i for i in range(len(completions)) if completions.lengths[i] - completions.prompt_lengths[i] >= SHORTEST]
    greedy = [i for i in usable if completions.temperatures[i] == 0]
    if len(greedy) < held_back or len(usable) <= held_back:
        raise ZerodraftError(
            f"{held_back} greedy completions are to be held back, but of {len(usable)} with at least {SHORTEST} tokens "
            f"{len(greedy)} are greedy: distil more, or lower held_back.sequences."
        )
    kept_back = random.Random(seed).sample(greedy, held_back)
    return sorted(set(usable) - set(kept_back)), kept_back


def frequent_tokens(completions: Completions, indices: Sequence[int], size: int, vocabulary: int) -> Int[Tensor, "v"]:
    """The `size` most frequent tokens of some completions, in rising order."""
    counts = np.zeros(vocabulary, np.int64)
    for i in indices:
        tokens, prompt_length = completions[i]
        if tokens.max() >= vocabulary:
            raise ZerodraftError(
                f"The completions hold token {tokens.max()}, the target's vocabulary has {vocabulary}: they are from "
                "another model."
            )
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
    """The drafter that the recipe starts from, with a new coupling if it had none."""
    assert recipe.drafter.start is not None
    old = load_pretrained(BlockDrafterModel, recipe.drafter.start, dtype=torch.float32)
    assert isinstance(old, BlockDrafterModel)
    if old.coupling is not None or not recipe.drafter.coupling:
        return old
    config: Any = copy.deepcopy(old.config)
    config.coupling = recipe.drafter.coupling
    drafter = BlockDrafterModel(config)
    drafter.load_state_dict(old.state_dict(), strict=False)
    return drafter


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
