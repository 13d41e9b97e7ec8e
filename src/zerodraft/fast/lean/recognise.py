"""Recognising the models that the lean decode path computes exactly.

A model qualifies only if every module in it is one that is known here: transformers' own classes of one Llama-like
family with plain linear layers and embeddings, and those of a Zero Token Transformer around it. Adapters, quantised
layers, hooks and replaced forwards all show up as something else, and the answer is no.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zerodraft.fast.lean.ztt import CYCLED_HOOKS, CYCLED_PARTS, family_model
from zerodraft.fast.modules import VARYING_ROPE, has_plain_parameters, is_untouched
from zerodraft.ztt.config import Plan
from zerodraft.ztt.interface import PREFIX

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)


@dataclass(frozen=True, slots=True)
class LeanSettings:
    """All that the lean path reads of a model beside its tensors, so that a change of any of it is noticed.

    **Fields:** `windows` are those of the stored layers, as in `LeanLayer`; `kept` is how much the cache of `generate`
    keeps of some layers, None for all; `eps` is that of all norms; `rope_scale` multiplies rotary turns, `score_scale`
    attention scores; `plan` is a Zero Token Transformer's.
    """

    windows: tuple[int | None, ...]
    kept: int | None
    head_dim: int
    eps: float
    rope_scale: float
    score_scale: float
    plan: Plan | None

    @classmethod
    def of(cls, model: Any) -> "LeanSettings":
        """Those of a model that qualifies."""
        plain = family_model(model)
        first = plain.model.layers[0].self_attn
        return cls(
            windows=_windows(plain),
            kept=getattr(plain.config, "sliding_window", None) if plain.config.model_type == "llama" else None,
            head_dim=first.head_dim,
            eps=plain.model.norm.variance_epsilon,
            rope_scale=float(plain.model.rotary_emb.attention_scaling),
            score_scale=float(first.scaling),
            plan=None if plain is model else model._plan,
        )


def qualifies(model: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Whether every part of a model is known, in this dtype on the CPU, and computes as its class says."""
    plain = family_model(model)
    family = _FAMILIES.get(getattr(getattr(plain, "config", None), "model_type", ""))
    return (
        family is not None
        and _made_of_known_parts(model, plain.config.model_type, family)
        and _plain_on_cpu(model, dtype)
        and _computes_as_known(plain)
        and not torch.is_autocast_enabled("cpu")
    )


def halves_of(model: Any) -> torch.dtype | None:
    """The 16-bit type of weights in which alone a model differs from one that the lean path takes; None if it does not,
    or in more than that."""
    dtypes = {p.dtype for p in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in (torch.bfloat16, torch.float16) and qualifies(model, dtype) else None


def _made_of_known_parts(model: nn.Module, model_type: str, family: str) -> bool:
    home = f"transformers.models.{model_type}.modeling_{model_type}"
    own = {f"{family}{part}" for part in _PARTS}
    plain = family_model(model)
    more_parts, more_hooks = ((), ()) if plain is model else (CYCLED_PARTS, CYCLED_HOOKS)
    if type(plain).__name__ != f"{family}ForCausalLM":
        return False
    for module in model.modules():
        kind = type(module)
        known = kind in _PLAIN or kind in more_parts or (kind.__module__ == home and kind.__name__ in own)
        if not known and (kind.__module__, kind.__name__) != ("transformers.activations", "SiLUActivation"):
            return False
        if not is_untouched(module, more_hooks):
            return False
    return True


def _plain_on_cpu(model: nn.Module, dtype: torch.dtype) -> bool:
    return has_plain_parameters(model) and all(
        p.dtype is dtype and p.is_cpu and p.layout is torch.strided for p in model.parameters()
    )


def _computes_as_known(model: Any) -> bool:
    config, decoder = model.config, model.model
    rotary, layers = decoder.rotary_emb, decoder.layers[: config.num_hidden_layers]
    attention = [layer.self_attn for layer in layers]
    norms = [m for m in decoder.modules() if type(m).__name__.endswith("RMSNorm")]
    return (
        len(layers) > 0
        and not (model.training and config.attention_dropout > 0)
        and str(config._attn_implementation).removeprefix(PREFIX) in ("eager", "sdpa")
        and all("SiLU" in type(layer.mlp.act_fn).__name__ for layer in layers)
        and rotary.rope_type not in VARYING_ROPE
        and all(2 * rotary.inv_freq.numel() == a.head_dim and a.scaling == attention[0].scaling for a in attention)
        and len({norm.variance_epsilon for norm in norms}) == 1
        and getattr(config, "is_causal", True)
        and all(a.is_causal and a.head_dim == attention[0].head_dim for a in attention)
        and decoder.embed_tokens.max_norm is None
        and len(getattr(config, "layer_types", None) or layers) >= len(layers)
    )


def obstacle(model: Any, settings: LeanSettings) -> str:
    """Why a model that qualifies by its parts is not packed, if there is a reason."""
    plain = family_model(model)
    shapes = [[p.shape for p in layer.parameters()] for layer in plain.model.layers[: len(settings.windows)]]
    if any(shape != shapes[0] for shape in shapes):
        return "its layers have weights of different shapes"
    if settings.kept not in (None, *settings.windows):
        return f"its cache keeps {settings.kept} tokens, as its configuration says, where its layers look at all"
    return ""


def _windows(plain: Any) -> tuple[int | None, ...]:
    """How far each layer's attention looks back: what the family's code makes of its configuration, and no more."""
    config, layers = plain.config, len(plain.model.layers[: plain.config.num_hidden_layers])
    if config.model_type == "llama":
        return (None,) * layers
    if config.model_type == "mistral":
        return (config.sliding_window,) * layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types[:layers])
