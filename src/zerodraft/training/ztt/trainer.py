"""`ZttTrainer`: a loss over cycles, and perplexity per number of cycles.

The loss gets its cycles from `CycleLoss`; `evaluate` gives the loss after every cycle in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zerodraft.training.base import RecipeTrainer
from zerodraft.training.data import IGNORED, PackedBlocks
from zerodraft.training.ztt.losses import CycleLoss


class ZttTrainer(RecipeTrainer):
    """Trains a ZTT (or a plain causal language model, which counts as one cycle).

    Args:
        cycle_loss: how many cycles each forward pass runs.
        evaluations: block sets by name; `evaluate` measures all of them.
        **kwargs: of `RecipeTrainer`.
    """

    logged_arguments = ("cycles",)

    def __init__(self, *, cycle_loss: CycleLoss, evaluations: Mapping[str, PackedBlocks], **kwargs: Any) -> None:
        self.cycle_loss, self.evaluations = cycle_loss, dict(evaluations)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        super().__init__(**kwargs)

    def step_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """How many cycles to run."""
        return self.cycle_loss.forward_arguments(
            self.state.global_step,
            self._micro_step,
            inputs["input_ids"].shape,
            self.args.process_index,
            progress=self.progress(),
        )

    # --- evaluation ---

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss and perplexity after each number of cycles, and bits per byte of the last, for every evaluation set."""
        if self._evaluated[0] == self.state.global_step:
            return self._evaluated[1]
        metrics: dict[str, float] = {}
        for name, blocks in self.evaluations.items():
            metrics |= metrics_by_cycle(evaluate_cycles(self, blocks), blocks, f"{metric_key_prefix}_{name}")
        self.log(dict(metrics))
        if self.json_log is not None:
            self.json_log.write(step=self.state.global_step, **metrics)
        self._evaluated = (self.state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[arg-type]  # HF type
        return metrics


def metrics_by_cycle(losses: Sequence[float], blocks: PackedBlocks, prefix: str) -> dict[str, float]:
    """Loss and perplexity after each number of cycles, and bits per byte of the last."""
    metrics: dict[str, float] = {}
    for cycle, loss in enumerate(losses, 1):
        metrics[f"{prefix}_loss_{cycle}"] = loss
        metrics[f"{prefix}_perplexity_{cycle}"] = math.exp(min(loss, 700.0))
    if not math.isnan(blocks.tokens_per_byte):
        metrics[f"{prefix}_bits_per_byte"] = losses[-1] / math.log(2) * blocks.tokens_per_byte
    return metrics


@torch.no_grad()
def evaluate_cycles(trainer: ZttTrainer, blocks: PackedBlocks) -> list[float]:
    """Mean loss per token after each cycle, the last being that of the whole model; every process takes its share.

    All processes run the same number of forward passes, as sharded models need; a process without a block of its own
    repeats one with weight zero.
    """
    # not the compiled one: a few batches are not worth a compilation
    model: Any = trainer.model
    accelerator = trainer.accelerator
    cycles, size = trainer.cycle_loss.cycles, trainer.args.per_device_eval_batch_size
    sums: Any = torch.zeros(cycles + 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for start in range(0, len(blocks), size * accelerator.num_processes):
        first = start + accelerator.process_index * size
        rows = [blocks[i] for i in range(first, min(first + size, len(blocks)))]
        batch = {k: torch.stack([r[k] for r in rows or [blocks[0]]]).to(accelerator.device) for k in blocks[0]}
        output = model(**batch, **({"cycle_weights": (1.0,) * cycles} if cycles > 1 else {}))
        losses = output.cycle_losses if cycles > 1 else output.loss[None]
        # a mean over a batch weighs as much as there are tokens in it that are predicted
        predicted = int((batch["labels"][:, 1:] != IGNORED).sum()) if rows else 0
        sums += predicted * torch.cat([losses.cpu().double(), torch.ones(1, dtype=torch.float64)])
    model.train(was_training)
    if accelerator.num_processes > 1:
        reduced: Any = accelerator.reduce(sums.float().to(accelerator.device), "sum")
        sums = reduced.cpu().double()
    return (sums[:-1] / sums[-1]).tolist()
