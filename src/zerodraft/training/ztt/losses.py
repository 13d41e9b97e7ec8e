"""What is minimised over the cycles: the last exit, a weighted mean of all exits, or a random number of cycles.

A model trained on its last cycle alone cannot be read out earlier. `weighted` trains every exit in every step and
pays for one readout (tail and LM head) a cycle; `sampled` trains one exit a step and saves the cycles it leaves out.
With `token_depths` some steps draw a depth for every token: then a token attends to others that stopped before it, as
it will at inference.

Cycles may be opened one after the other (`cycles_from`): the early steps are cheaper. Exits may be trained late
(`exits_from`), as their losses from the first step on cost quality at full depth. They learn from the text or from the
last cycle (`exit_targets`).

Draws are a pure function of (seed, step, micro-step) and the share of the training that has passed, so all processes
run the same cycles. A resumed run repeats them, unless the share is that of a time limit (`max_minutes`), which begins
anew.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.recipe import LossRecipe, Weights


def weights_over_cycles(weights: Weights, cycles: int) -> tuple[float, ...]:
    """Non-negative weights of the exits, summing to 1.

    Args:
        weights: one number per cycle, `"uniform"`, or `"linear"` (1, 2, 3, ...: the last exit matters most).
        cycles: how many there must be.
    """
    if weights == "uniform":
        weights = (1.0,) * cycles
    elif weights == "linear":
        weights = tuple(float(cycle) for cycle in range(1, cycles + 1))
    if len(weights) != cycles:
        raise ZerodraftError(
            f"loss.weights has {len(weights)} numbers, the model has {cycles} cycles: give one for each"
        )
    if not all(0 <= weight < math.inf for weight in weights) or not 0 < sum(weights) < math.inf:
        raise ZerodraftError(f"loss.weights must be finite, non-negative and not all zero, got {list(weights)}")
    return tuple(weight / sum(weights) for weight in weights)


def _check_openings(shares: tuple[float, ...], cycles: int) -> None:
    if shares and len(shares) != cycles - 1:
        raise ZerodraftError(
            f"loss.cycles_from has {len(shares)} numbers, the model has {cycles} cycles: give one for each but the "
            "first"
        )
    if not all(0 <= share < 1 for share in shares) or list(shares) != sorted(shares):
        raise ZerodraftError(f"loss.cycles_from is {list(shares)}, expected ascending shares of at least 0 and below 1")


class CycleLoss:
    """Says for every forward pass how many cycles to run and how to weigh them.

    Args:
        recipe: kind and weights.
        cycles: the model's number of cycles.
        seed: of the draws.
    """

    def __init__(self, recipe: LossRecipe, cycles: int, seed: int) -> None:
        if not 0 <= recipe.token_depths <= 1:
            raise ZerodraftError(f"loss.token_depths is {recipe.token_depths}, expected a share between 0 and 1")
        if recipe.token_depths and recipe.kind != "sampled":
            raise ZerodraftError(f"loss.token_depths needs loss.kind 'sampled', got '{recipe.kind}'")
        if recipe.exits_from and recipe.kind == "last":
            raise ZerodraftError("loss.exits_from needs loss.kind 'weighted' or 'sampled', got 'last'")
        if recipe.exit_targets == "last" and recipe.kind != "weighted":
            raise ZerodraftError(f"loss.exit_targets 'last' needs loss.kind 'weighted', got '{recipe.kind}'")
        if not 0 <= recipe.exits_from < 1:
            raise ZerodraftError(f"loss.exits_from is {recipe.exits_from}, expected a share of at least 0 and below 1")
        _check_openings(recipe.cycles_from, cycles)
        self.kind, self.token_depths, self.cycles, self.seed = recipe.kind, recipe.token_depths, cycles, seed
        self.cycles_from, self.exits_from = recipe.cycles_from, recipe.exits_from
        self.distilled = {"distil_cycles": True} if recipe.exit_targets == "last" else {}
        self.weights = weights_over_cycles(recipe.weights, cycles)

    def open_cycles(self, progress: float) -> int:
        """How many cycles run when a share `progress` of the training has passed."""
        return 1 + sum(progress >= share for share in self.cycles_from) if self.cycles_from else self.cycles

    def forward_arguments(
        self, step: int, micro_step: int, shape: Sequence[int], rank: int = 0, *, progress: float
    ) -> dict[str, Any]:
        """Keyword arguments for `ZttForCausalLM.forward`.

        Args:
            step: optimizer step, from 0.
            micro_step: forward pass within the step.
            shape: (batch, tokens) of the input.
            rank: of the process; it changes only the depths of single tokens, never the number of cycles that run.
            progress: share of the training that has passed.
        """
        cycles = self.open_cycles(progress)
        everything = {} if cycles == self.cycles else {"cycles": cycles}
        weights = self.weights[:cycles]
        if self.kind == "last" or cycles == 1 or progress < self.exits_from or not any(weights):
            return everything
        if self.kind == "weighted":
            return {**everything, **self.distilled, "cycle_weights": weights}
        draw = random.Random(f"{self.seed}:{step}:{micro_step}")
        if draw.random() < self.token_depths:
            return {**everything, "exit_depth": self._depths(step, micro_step, shape, rank, weights)}
        return {"cycles": draw.choices(range(1, cycles + 1), weights)[0]}

    def _depths(
        self, step: int, micro_step: int, shape: Sequence[int], rank: int, weights: tuple[float, ...]
    ) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{step}:{micro_step}:{rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.multinomial(torch.tensor(weights), shape[0] * shape[1], replacement=True, generator=generator)
        return (drawn + 1).view(shape[0], shape[1])
