"""LoRA on a Zero Token Transformer through PEFT, and what PEFT would leave out.

PEFT trains and saves what it added and what it is told by name. A fine-tuned conversion is nothing without its zero
tokens, gates (they begin closed) and other own parts, so they go into `modules_to_save`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.recipe import PeftRecipe
from zerodraft.ztt.pretrained import OWN_PARTS, ZttPreTrainedModel


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
    owned = OWN_PARTS if isinstance(model, ZttPreTrainedModel) else ()
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft says int and divides it
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules) or "all-linear",
        modules_to_save=[name for name in owned if getattr(model, name) is not None],
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]  # a PreTrainedModel
    except ValueError as error:
        names = ", ".join(recipe.target_modules)
        raise ZerodraftError(f"peft.target_modules: no linear module of the model is called {names}") from error


def trained_parts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters that are trained: each of `OWN_PARTS`, adapters, and all other weights."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = "adapters" if ".lora_" in name else "weights"
            part = next((own for own in OWN_PARTS if own in name.split(".")), other)
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def load_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> Any:
    """The model with the adapters and own parts (`OWN_PARTS`) that a fine-tuning run wrote to `model/adapter`.

    Args:
        model: the model that the run started from (converted in the same way).
        folder: of the adapter.

    Raises:
        ZerodraftError: an older version wrote it, with zero tokens and gates in a file of their own.
    """
    from peft import PeftModel

    if Path(folder, "zero_tokens.safetensors").is_file():
        raise ZerodraftError(
            f"The adapter in '{folder}' was written by an older version, which kept zero tokens and gates apart; use "
            "the merged model of the run."
        )
    return PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]  # a PreTrainedModel
