"""`RecipeTrainer`: transformers' Trainer driven by our recipes, with a log of every step and whole checkpoints.

What differs from the Trainer, and why:
- optimizer and schedule come from the recipe, whose schedule knows a time limit;
- every step's loss goes to `log.jsonl`;
- a checkpoint is written beside its place and renamed, so a killed run never leaves a half-written one to resume from;
- a loss that is not finite stops the run at once.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import rotate_checkpoints

from zerodraft.common.errors import ZerodraftError, did_you_mean, why, writing
from zerodraft.training.callbacks import JsonLog
from zerodraft.training.folder import write_sums
from zerodraft.training.optim import build_optimizer, learning_rate_scale
from zerodraft.training.recipe import TrainingRecipe

PARTIAL = ".partial"


class LossNotFinite(ZerodraftError):
    """The loss became infinite or not a number."""


class RecipeTrainer(Trainer):
    """Trains a model as a `TrainingRecipe` says; sub-classes say what the loss is and how to evaluate.

    Args:
        recipe: optimizer and schedule.
        log: where every step's loss goes; only the first process needs one.
        **kwargs: of the transformers Trainer.
    """

    def __init__(self, *, recipe: TrainingRecipe, log: JsonLog | None, **kwargs: Any) -> None:
        self.recipe, self.json_log = recipe, log
        self._micro_step, self._step, self._passed = 0, 0, 0.0
        self._saving = False
        self._unwritten: list[tuple[dict[str, Any], torch.Tensor]] = []
        super().__init__(**kwargs)

    # --- optimisation ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Parameter groups of `training.optim` instead of the Trainer's."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self.recipe)  # type: ignore[arg-type]  # set by Trainer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The recipe's schedule, which knows the number of steps itself."""
        if self.lr_scheduler is None:
            self._started = time.monotonic()
            # a lambda: the scheduler's state leaves functions out, but would pickle a bound method's attributes
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self._scale(step))  # type: ignore[arg-type]  # set by Trainer
            self._created_lr_scheduler = True
        return self.lr_scheduler  # type: ignore[return-value]  # the Trainer declares a wider type

    def _elapsed(self) -> float:
        """Share of the time limit that has passed, by the clock of the first process."""
        if not self.recipe.max_minutes:
            return 0.0
        elapsed = (time.monotonic() - self._started) / 60 / self.recipe.max_minutes
        return broadcast_object_list([elapsed])[0] if self.args.world_size > 1 else elapsed

    def _scale(self, step: int) -> float:
        self._passed = self._elapsed()
        if self._passed >= 1:
            self.control.should_training_stop = True
        return learning_rate_scale(self.recipe, step, self._passed)

    def progress(self) -> float:
        """Share of the training that has passed: of the steps or of the time limit, whichever is further. The limit is
        that of a process: a resumed run has all of it again, so its share may be smaller than before."""
        return max(self.state.global_step / self.recipe.steps, self._passed)

    def step_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What a forward pass gets beside its batch; also goes to the log, under `logged_arguments`."""
        return {}

    logged_arguments: tuple[str, ...] = ()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward pass, logged."""
        # the last update of an epoch may have fewer passes, so they are not counted by `accumulation`
        step = self.state.global_step + 1
        self._micro_step = self._micro_step + 1 if step == self._step else 0
        self._step = step
        arguments = self.step_arguments(inputs)
        loss = super().training_step(model, {**inputs, **arguments}, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise LossNotFinite(
                f"the loss became {loss.item()} at step {step}: lower training.learning_rate "
                "(or check the weights that the run started from); checkpoints up to here are kept"
            )
        if self._micro_step == 0:
            rate = self.optimizer.param_groups[-1]["lr"]  # type: ignore[union-attr]  # there is one in training
            row = {"step": step, "learning_rate": rate}
            self._unwritten.append(({**row, **{name: arguments.get(name) for name in self.logged_arguments}}, loss))
        else:
            row, earlier = self._unwritten[-1]
            # several forward passes, each with its own arguments
            self._unwritten[-1] = ({**row, **dict.fromkeys(self.logged_arguments)}, earlier + loss)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # of a run that was killed after its last step: the Trainer would make one more and only then look
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also writes what has been trained since the last log to `log.jsonl`."""
        self.write_losses()
        super().log(logs, *args, **kwargs)

    def write_losses(self) -> None:
        """Writes the losses of the steps since the last call, averaged over processes."""
        if not self._unwritten:
            return
        losses: Any = torch.stack([loss for _, loss in self._unwritten])
        if self.args.world_size > 1:
            losses = self.accelerator.reduce(losses, "mean")
        if self.json_log is not None:
            for (row, _), loss in zip(self._unwritten, losses.tolist(), strict=True):
                self.json_log.write(**{key: value for key, value in row.items() if value is not None}, loss=loss)
        self._unwritten = []

    def passes_before(self, step: int) -> int:
        """Forward passes that each process makes in the first `step` updates."""
        rows = len(self.train_dataset) // self.args.per_device_train_batch_size  # type: ignore[arg-type]  # it has a length
        return forward_passes(step, rows // self.args.world_size, self.recipe.accumulation)

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_losses()
        folder = Path(super()._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            with writing(f"The checkpoint in '{folder}'"):
                super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            with writing(f"The checkpoint in '{folder}'"):
                write_sums(folder / PARTIAL / name)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(folder / PARTIAL / name, folder / name)
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
            rotate_checkpoints(str(folder), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def forward_passes(steps: int, batches: int, accumulation: int) -> int:
    """Forward passes in `steps` updates, when `batches` make an epoch and its last update takes what is left of it."""
    updates = -(-batches // accumulation)
    return steps // updates * batches + steps % updates * accumulation


def training_arguments(recipe: TrainingRecipe, output: str, seed: int, **kwargs: Any) -> TrainingArguments:
    """The recipe in the Trainer's own words."""
    return TrainingArguments(
        output_dir=output,
        seed=seed,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        activation_checkpointing=recipe.gradient_checkpointing,
        torch_compile=recipe.compile,
        # on a machine that has nothing else transformers would refuse bfloat16 unless it is told so
        use_cpu=recipe.use_cpu or not torch.accelerator.is_available(),
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        save_total_limit=recipe.keep_checkpoints,
        dataloader_drop_last=True,
        # torch warns when there is nothing to pin memory for
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=reporters(recipe),
        **kwargs,
    )


def reporters(recipe: TrainingRecipe) -> list[str]:
    """Names of what the Trainer reports to.

    Raises:
        ZerodraftError: transformers does not know a name, or its package is not there.
    """
    has_tensorboard = recipe.tensorboard and importlib.util.find_spec("tensorboard") is not None
    for name in recipe.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ZerodraftError(f"training.report_to '{name}' is unknown{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ZerodraftError(f"training.report_to '{name}' cannot be used: {why(error)}") from error
    return list(dict.fromkeys([*(["tensorboard"] if has_tensorboard else []), *recipe.report_to]))
