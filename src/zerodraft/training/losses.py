"""What is minimised over the cycles: the last exit, a weighted mean of all exits, or a random number of cycles.

A model trained on its last cycle alone cannot be read out earlier. `weighted` trains every exit in every step and
pays for one readout (tail and LM head) a cycle; `sampled` trains one exit a step and saves the cycles it leaves out.
With `token_depths` some steps draw a depth for every token: then a token attends to others that stopped before it, as
it will at inference.

Draws are a pure function of (seed, step, micro-step), so a resumed run repeats them, and all processes run the same
cycles.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch

from zerodraft.errors import ZerodraftError
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
    if min(weights) < 0 or sum(weights) <= 0:
        raise ZerodraftError(f"loss.weights must be non-negative and not all zero, got {list(weights)}")
    return tuple(weight / sum(weights) for weight in weights)


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
        self.kind, self.token_depths, self.cycles, self.seed = recipe.kind, recipe.token_depths, cycles, seed
        self.weights = weights_over_cycles(recipe.weights, cycles)

    def forward_arguments(self, step: int, micro_step: int, shape: Sequence[int], rank: int = 0) -> dict[str, Any]:
        """Keyword arguments for `ZttForCausalLM.forward`.

        Args:
            step: optimizer step, from 0.
            micro_step: forward pass within the step.
            shape: (batch, tokens) of the input.
            rank: of the process; it changes only the depths of single tokens, never the number of cycles that run.
        """
        if self.kind == "last" or self.cycles == 1:
            return {}
        if self.kind == "weighted":
            return {"cycle_weights": self.weights}
        draw = random.Random(f"{self.seed}:{step}:{micro_step}")
        if draw.random() < self.token_depths:
            return {"exit_depth": self._depths(step, micro_step, shape, rank)}
        return {"cycles": draw.choices(range(1, self.cycles + 1), self.weights)[0]}

    def _depths(self, step: int, micro_step: int, shape: Sequence[int], rank: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{step}:{micro_step}:{rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.multinomial(
            torch.tensor(self.weights), shape[0] * shape[1], replacement=True, generator=generator
        )
        return (drawn + 1).view(shape[0], shape[1])
