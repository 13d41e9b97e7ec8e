"""A run that trains a drafter on a target's completions, whatever the drafter's network is.

Some greedy completions are held back, and the acceptance length on them is what evaluations measure. The folder of a
run is that of `pretrain`: `recipe.json`, `log.jsonl` (every step), `checkpoint-N/`, and at the end `model/` and
`results.json`.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.training.base import RecipeTrainer, training_arguments
from zerodraft.training.callbacks import ProgressBar
from zerodraft.training.drafters.completions import Completions, check_vocabulary, read_completions
from zerodraft.training.folder import checkpoint_step, claimed, start_folder
from zerodraft.training.kept import leave

SHORTEST = 12
"""Completions of fewer tokens are left out."""


class HeldBackTrainer(RecipeTrainer):
    """A `RecipeTrainer` that evaluates the acceptance length; sub-classes say how to measure it.

    Args:
        held_back: completions to measure it on.
        measured: how many of them to judge during training.
        **kwargs: of `RecipeTrainer`.
    """

    def __init__(self, *, held_back: Sequence[int], measured: int, **kwargs: Any) -> None:
        self.held_back, self.measured = list(held_back), measured
        super().__init__(**kwargs)

    def measure(self, indices: Sequence[int]) -> Any:
        """Acceptance on completions: a dataclass with at least `mat` and `by_position`."""
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean accepted tokens and acceptance by position on some held-back completions."""
        acceptance = self.measure(self.held_back[: self.measured])
        by_position = {f"eval_accepted_{j}": float(share) for j, share in enumerate(acceptance.by_position, 1)}
        metrics = {"eval_mat": acceptance.mat, **by_position}
        self.log(dict(metrics))
        if self.json_log is not None:
            self.json_log.write(step=self.state.global_step, **metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[arg-type]  # HF type
        return metrics


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


@dataclass(slots=True)
class DrafterRun:
    """A run whose target and data are there: `train` and `held_back` are numbers of completions. A `tokenizer` is saved
    beside the drafter."""

    recipe: Any
    folder: Path
    checkpoint: str | None
    arguments: TrainingArguments
    completions: Completions
    target: Any
    train: list[int]
    held_back: list[int]
    tokenizer: Any = None

    def go(
        self,
        trainer_class: type[HeldBackTrainer],
        drafter: Any,
        blocks: int,
        callbacks: Sequence[TrainerCallback] | None,
        **options: Any,
    ) -> dict[str, Any]:
        """Trains and writes the results.

        Args:
            trainer_class: the trainer.
            drafter: the network.
            blocks: that are learned from in a pass over one sequence.
            callbacks: instead of the progress bar.
            **options: of the trainer class.

        Raises:
            ZerodraftError: too few sequences for one batch, or a loss that is not finite.
        """
        recipe, folder, arguments = self.recipe, self.folder, self.arguments
        needed = recipe.training.batch_size * arguments.world_size
        if len(self.train) < needed:
            raise ZerodraftError(
                f"A batch takes {needed} sequences (training.batch_size of each process), but there are only "
                f"{len(self.train)} to train on: distil more, or lower training.batch_size."
            )
        log = start_folder(folder, recipe, checkpoint_step(self.checkpoint)) if arguments.process_index == 0 else None
        trainer = trainer_class(
            recipe=recipe.training,
            log=log,
            held_back=self.held_back,
            measured=recipe.held_back.measured,
            model=drafter,
            args=arguments,
            train_dataset=Sequences(self.train, recipe.seed),
            eval_dataset=Sequences(self.held_back, recipe.seed),
            callbacks=[ProgressBar(needed * blocks * recipe.training.accumulation, "blocks")]
            if callbacks is None
            else list(callbacks),
            **options,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=self.checkpoint)
        seconds = time.perf_counter() - started
        trainer.write_losses()
        acceptance = asdict(trainer.measure(self.held_back))
        results = {
            "parameters": drafter.num_parameters(),
            "trained_parameters": drafter.num_parameters(only_trainable=True),
            "steps": trainer.state.global_step,
            "blocks": trainer.passes_before(trainer.state.global_step) * needed * blocks,
            "seconds": seconds,
            "resumed_from": self.checkpoint and Path(self.checkpoint).name,
            "completions": {
                "sequences": len(self.train),
                "tokens": int(self.completions.lengths[self.train].sum()),
            },
            "held_back": {
                "sequences": len(self.held_back),
                **{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in acceptance.items()},
            },
        }
        return leave(trainer, folder, recipe, results, self.tokenizer)


@contextmanager
def prepared(recipe: Any, resume: bool) -> Iterator[DrafterRun]:
    """Holds the folder, reads completions and target, splits the data, and seeds.

    Raises:
        ZerodraftError: recipe, target and completions do not fit, or the folder holds another run.
    """
    with claimed(recipe.out, recipe, resume) as checkpoint:
        yield _prepare(recipe, Path(recipe.out), checkpoint)


def _prepare(recipe: Any, folder: Path, checkpoint: str | None) -> DrafterRun:
    completions = read_completions([os.path.expandvars(path) for path in recipe.data])
    arguments = training_arguments(recipe.training, str(folder), recipe.seed)
    target: Any = load_pretrained(AutoModelForCausalLM, resolve(recipe.target), dtype=torch.float32)
    check_vocabulary(completions, target.get_input_embeddings().weight.shape[0])
    train, held_back = split_completions(completions, recipe.held_back.sequences, recipe.seed)
    set_seed(recipe.seed)
    target = target.to(arguments.device).eval()
    return DrafterRun(recipe, folder, checkpoint, arguments, completions, target, train, held_back)
