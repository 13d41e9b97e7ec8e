"""LoRA on a Zero Token Transformer through PEFT, and what PEFT would leave out.

PEFT saves what it added. Zero tokens and cycle gates are ours, not its: a fine-tuned conversion is nothing without them
(its gates begin closed), so they stay trainable and go into `zero_tokens.safetensors` next to the adapter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from zerodraft.errors import ZerodraftError
from zerodraft.training.recipe import PeftRecipe

OWN_PARTS = ("zero_tokens", "cycle_gates", "cycle_lora")
FILE_NAME = "zero_tokens.safetensors"


def add_adapters(model: nn.Module, recipe: PeftRecipe) -> Any:
    """LoRA on linear modules; one adapter per stored layer, which all its cycles share.

    Args:
        model: a causal language model; it is wrapped in place.
        recipe: rank, scale and names of the modules.

    Raises:
        ZerodraftError: peft is not installed, or no module has one of the names.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ZerodraftError("peft.rank > 0 needs the peft extra: pip install 'zerodraft[peft]'") from error
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft says int and divides it
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules) or "all-linear",
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]  # a PreTrainedModel
    except ValueError as error:
        names = ", ".join(recipe.target_modules)
        raise ZerodraftError(f"peft.target_modules: no linear module of the model is called {names}") from error
    for parameter in own_parameters(adapted).values():
        parameter.requires_grad_(True)
    return adapted


def load_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> Any:
    """The model with the adapters, zero tokens and gates that a fine-tuning run wrote to `model/adapter`.

    Args:
        model: the model that the run started from (converted in the same way).
        folder: of the adapter.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]  # a PreTrainedModel
    load_own_parameters(adapted, folder)
    return adapted


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Zero tokens, gates and per-cycle LoRA by name."""
    return {name: p for name, p in model.named_parameters() if any(part in name.split(".") for part in OWN_PARTS)}


def save_own_parameters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `own_parameters`; nothing if there are none."""
    tensors = {name: p.detach().contiguous() for name, p in own_parameters(model).items()}
    if tensors:
        save_file(tensors, Path(folder) / FILE_NAME)


def load_own_parameters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Reads what `save_own_parameters` wrote.

    Raises:
        ZerodraftError: the file's tensors are not those of the model.
    """
    path, own = Path(folder) / FILE_NAME, own_parameters(model)
    tensors = load_file(path) if path.is_file() else {}
    wrong = set(own) ^ set(tensors) or {name for name in own if own[name].shape != tensors[name].shape}
    if wrong:
        raise ZerodraftError(
            f"'{path}' does not fit the model: {sorted(wrong)[0]} is missing, extra or of another shape"
        )
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])
