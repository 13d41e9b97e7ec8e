"""Learning-rate schedule, parameter groups, and Muon joined with AdamW.

Weight decay acts on matrices only. Norms, biases, embeddings, zero tokens, gates and the numbers of cycles have none: a
decayed zero token drifts to the key 0, whose score is the same for every query, and a decayed gate pulls a deepened
model back to its base. With `muon`, the decayed matrices go to Muon and everything else stays with AdamW.
The matrices of cycled layers can have a learning rate of their own: they get a gradient from every cycle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from zerodraft.training.muon import Muon
from zerodraft.training.recipe import TrainingRecipe
from zerodraft.ztt.model import ZttForCausalLM
from zerodraft.ztt.pretrained import OWN_PARTS

UNDECAYED = tuple(part for part in OWN_PARTS if part != "cycle_lora")
"""Own parts of a Zero Token Transformer that are no matrices."""


def learning_rate_scale(recipe: TrainingRecipe, step: int, elapsed: float = 0.0) -> float:
    """Learning rate as a share of the peak.

    Warm-up is linear. `wsd` then keeps the peak and decays linearly over the last `decay_fraction` of the steps, so
    that a run can be extended from any checkpoint on the plateau (Hägele et al. 2024).

    Args:
        recipe: schedule and number of steps.
        step: optimizer step, from 0.
        elapsed: share of the time limit that has passed; a run that will not get through its steps is taken to be
            that far.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        start = recipe.warmup_steps
    else:
        start = max(recipe.warmup_steps, recipe.steps - round(recipe.decay_fraction * recipe.steps))
    step = max(step, round(elapsed * recipe.steps))
    progress = min(max(step - start, 0) / max(recipe.steps - start, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if recipe.schedule == "cosine" else 1 - progress
    return recipe.final_scale + (1 - recipe.final_scale) * shape


def is_decayed(name: str, parameter: nn.Parameter, embeddings: set[int]) -> bool:
    """Whether weight decay acts on a parameter: matrices do, unless they are embeddings or own parts."""
    return parameter.ndim == 2 and id(parameter) not in embeddings and not _is_own(name)


def _is_own(name: str) -> bool:
    return any(part in name.split(".") for part in UNDECAYED)


def cycled(model: nn.Module) -> set[int]:
    """Identities of the parameters in layers that run several times."""
    found: set[int] = set()
    for ztt in (module for module in model.modules() if isinstance(module, ZttForCausalLM)):
        if ztt.config.cycles > 1:
            shared = (layer for index, layer in enumerate(ztt.layers) if ztt.config.is_shared(index))
            found |= {id(parameter) for layer in shared for parameter in layer.parameters()}
    return found


def build_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """AdamW, or Muon for the decayed matrices and AdamW for the rest."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        embeddings.add(id(output.weight))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if is_decayed(name, p, embeddings)]
    own = [p for name, p in trained if _is_own(name)]
    rest = [p for name, p in trained if not is_decayed(name, p, embeddings) and not _is_own(name)]
    muon = recipe.optimizer == "muon" and bool(decayed)
    rate = (muon and recipe.muon_learning_rate) or recipe.learning_rate
    factor = recipe.shared_learning_rate_factor
    apart = cycled(model) if factor != 1 else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if id(p) not in apart], "weight_decay": recipe.weight_decay, "lr": rate},
        {"params": [p for p in decayed if id(p) in apart], "weight_decay": recipe.weight_decay, "lr": rate * factor},
        {"params": own, "weight_decay": 0.0, "lr": recipe.ztt_learning_rate or recipe.learning_rate},
        {"params": rest, "weight_decay": 0.0, "lr": recipe.learning_rate},
    ]
    # not every model has parameters of every kind
    matrices, others = ([group for group in part if group["params"]] for part in (groups[:2], groups[2:]))
    adamw = partial(torch.optim.AdamW, betas=(recipe.betas[0], recipe.betas[1]))
    if not muon:
        return adamw(matrices + others)
    return JoinedOptimizer([Muon(matrices), *([adamw(others)] if others else [])])


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each over its own parameters, behind the interface of one.

    `param_groups` holds the members' own group dictionaries, so a learning-rate scheduler reaches them.
    """

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for member in self.members for group in member.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads
        """One step of every member."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The members' state dictionaries, in order."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self._join()
