"""The model that a recipe describes: from scratch, from a checkpoint, or converted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zerodraft.common.errors import ZerodraftError, did_you_mean, reading
from zerodraft.models.loading import load_config, load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.training.recipe import ModelRecipe
from zerodraft.ztt.config import ZttConfig
from zerodraft.ztt.model import ZttForCausalLM

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
)
CYCLING = ("head_layers", "tail_layers", "cycles", "schedule", "zero_tokens")


def build_from_scratch(recipe: ModelRecipe, tokenizer: Any) -> PreTrainedModel:
    """A randomly initialised model whose vocabulary is the tokenizer's."""
    if recipe.family not in CONFIG_MAPPING:
        raise ZerodraftError(
            f"model.family '{recipe.family}' is unknown{did_you_mean(recipe.family, CONFIG_MAPPING)[:200]}"
        )
    known = AutoConfig.for_model(recipe.family)
    _check_keys("model.base", recipe.base, {*known.to_dict(), *known.attribute_map})
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {name: getattr(recipe, name) for name in SIZES}
    cycling = _cycling(recipe)
    # the family checks some of its sizes and stumbles over others
    with reading("The model that the recipe describes", "cannot be made"):
        base = AutoConfig.for_model(recipe.family, **sizes, **special, vocab_size=len(tokenizer), **recipe.base)
        if recipe.kind == "plain":
            model = AutoModelForCausalLM.from_config(base, trust_remote_code=False)
        else:
            model = ZttForCausalLM(ZttConfig(base_config=base, **cycling))
    # transformers does not look into a nested configuration for these
    model.generation_config.update(**special)
    return model


def build_from_start(recipe: ModelRecipe) -> PreTrainedModel:
    """The checkpoint `recipe.start`; a plain one is converted unless the recipe wants a plain model."""
    path = resolve(recipe.start or "")
    is_ztt = load_config(path).model_type == ZttConfig.model_type
    if recipe.kind == "plain" and is_ztt:
        raise ZerodraftError(f"model.start '{recipe.start}' is a Zero Token Transformer, so model.kind must be 'ztt'")
    # weights are trained in float32, whatever they were saved in; bf16 is a matter of autocast
    model = load_pretrained(ZttForCausalLM if is_ztt else AutoModelForCausalLM, path, dtype=torch.float32)
    check_same(recipe, model.config)
    if is_ztt or recipe.kind == "plain":
        return model
    settings = {"init": recipe.init, **_cycling(recipe)}
    return ZttForCausalLM.from_base(model, mode=recipe.convert, **settings)


def check_same(recipe: ModelRecipe, config: PreTrainedConfig) -> None:
    """A model that a run starts from keeps its sizes, and a Zero Token Transformer its cycles: what the recipe says of
    them must be so already.

    Raises:
        ZerodraftError: a setting that is neither the recipe's default nor the model's own, or an unknown one.
    """
    usual, theirs = ModelRecipe(), {name: getattr(config, name, None) for name in SIZES}
    asked = {name: getattr(recipe, name) for name in SIZES}
    if isinstance(config, ZttConfig):
        asked |= _cycling(recipe)
        theirs |= {name: getattr(config, name) for name in asked.keys() - theirs.keys()}
        theirs["num_hidden_layers"] = config.stored_layers
    for name, value in asked.items():
        own = name in recipe.ztt
        if value != theirs[name] and (own or value != getattr(usual, name)):
            raise ZerodraftError(
                f"model.{'ztt.' if own else ''}{name} is {value!r}, and the model to start from, {recipe.start!r}, has "
                f"{theirs[name]!r}, which training does not change: leave it out, or start from another model"
            )


def number_of_cycles(model: PreTrainedModel) -> int:
    """Exits of the model: its cycles, or 1 for a plain one."""
    return model.config.cycles if isinstance(model.config, ZttConfig) else 1


def _cycling(recipe: ModelRecipe) -> dict[str, Any]:
    _check_keys("model.ztt", recipe.ztt, {f.name for f in dataclasses.fields(ZttConfig)} - {*CYCLING, "base_config"})
    return {**{name: getattr(recipe, name) for name in CYCLING}, **recipe.ztt}


def _check_keys(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    # configs accept any key and ignore those that they do not know
    for key in given:
        if key not in known:
            suggestion = did_you_mean(key, known)
            raise ZerodraftError(f"unknown key '{where}.{key}'{suggestion if 'did you mean' in suggestion else ''}")
