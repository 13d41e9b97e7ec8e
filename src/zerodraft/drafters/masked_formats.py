"""Masked diffusion language models as they lie on the hub, read without running any code of theirs.

Two families: Dream (`model_type: "Dream"`; Dream-org/Dream-v0-*, apple/DiffuCoder-*), which is Qwen2 with a mask token
and shifted logits, and LLaDA (`model_type: "llada"`; GSAI-ML/LLaDA-8B-*, GSAI-ML/LLaDA-1.5), a Llama with the names of
OLMo. A family is two functions: from its `config.json` to ours, and from its tensor names to ours. Our own checkpoints
are read by `from_pretrained`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.drafters.masked_model import MaskedConfig, MaskedModel
from zerodraft.drafters.rotary import rope_parameters, rotary_of
from zerodraft.models.loading import check_depth, check_finite, load_pretrained, read_config, read_tensors
from zerodraft.models.resolve import resolve

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A family of checkpoints: how its `config.json` and its tensors' names translate to ours (None: not needed)."""

    config: Callable[[Fields], MaskedConfig]
    tensor: Callable[[str], str | None]


def dream_config(fields: Fields) -> MaskedConfig:
    """Dream and DiffuCoder: the fields of Qwen2 and `mask_token_id`."""
    _refuse(fields, use_sliding_window=False, use_mrope=False)
    return MaskedConfig(
        vocab_size=_need(fields, "vocab_size"),
        hidden_size=_need(fields, "hidden_size"),
        intermediate_size=_need(fields, "intermediate_size"),
        num_hidden_layers=_need(fields, "num_hidden_layers"),
        num_attention_heads=_need(fields, "num_attention_heads"),
        num_key_value_heads=fields.get("num_key_value_heads"),
        hidden_act=fields.get("hidden_act", "silu"),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_parameters=rope_parameters({"max_position_embeddings": 32768} | dict(fields), theta=10000.0),
        max_position_embeddings=fields.get("max_position_embeddings", 32768),
        attention_bias=True,
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
        mask_token_id=fields.get("mask_token_id", 151666),
        shifted=True,
    )


def dream_tensor(name: str) -> str | None:
    """Ours are Qwen2's, without the prefix."""
    return None if name.endswith("rotary_emb.inv_freq") else name.removeprefix("model.")


def llada_config(fields: Fields) -> MaskedConfig:
    """LLaDA and LLaDA-1.5: the fields of OLMo with `block_type: "llama"`."""
    _refuse(
        fields, block_type="llama", activation_type="silu", layer_norm_type="rms", rope=True, alibi=False,
        attention_layer_norm=False, include_bias=False, bias_for_layer_norm=False, input_emb_norm=False,
        scale_logits=False, block_group_size=1,
    )  # fmt: skip
    heads, width, longest = _need(fields, "n_heads"), _need(fields, "d_model"), fields.get("max_sequence_length", 4096)
    return MaskedConfig(
        vocab_size=fields.get("embedding_size") or _need(fields, "vocab_size"),
        hidden_size=width,
        intermediate_size=fields.get("mlp_hidden_size") or _need(fields, "mlp_ratio") * width,
        num_hidden_layers=_need(fields, "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("n_kv_heads") or (1 if fields.get("multi_query_attention") else heads),
        hidden_act="silu",
        rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
        rope_parameters=rope_parameters(
            dict(fields) | {"max_position_embeddings": longest, "hidden_size": width, "num_attention_heads": heads},
            theta=10000.0,
        ),
        max_position_embeddings=longest,
        attention_bias=fields.get("include_qkv_bias", False),
        tie_word_embeddings=fields.get("weight_tying", False),
        mask_token_id=fields.get("mask_token_id", 126336),
        shifted=False,
    )


LLADA_NAMES = {
    "wte": "embed_tokens",
    "ln_f": "norm",
    "ff_out": "lm_head",
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
}


def llada_tensor(name: str) -> str | None:
    """`ff_out` is the head, or in a block the projection down."""
    found = re.fullmatch(r"model\.transformer\.(?:blocks\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    block, part, kind = found.groups()
    if block is None:
        return f"{LLADA_NAMES.get(part, part)}.{kind}"
    part = "mlp.down_proj" if part == "ff_out" else LLADA_NAMES.get(part, part)
    return f"layers.{block}.{part}.{kind}"


FORMATS = {"dream": Format(dream_config, dream_tensor), "llada": Format(llada_config, llada_tensor)}
"""By `model_type`, in small letters."""


def is_masked(model_type: str) -> bool:
    """Whether a `model_type` is that of a masked diffusion language model that can be loaded."""
    return model_type.lower() in (*FORMATS, MaskedConfig.model_type)


def load_masked(path: str | PathLike[str], dtype: torch.dtype | None = None) -> MaskedModel:
    """A masked diffusion language model from a directory: Dream's, LLaDA's, or one that we trained.

    Args:
        path: the directory, with `config.json` and safetensors (one file, or shards with their index); a training
            run's folder; or a hub id.
        dtype: to have the weights in; as they are stored if not given.

    Raises:
        ZerodraftError: an unknown format, missing files or tensors, shapes that do not fit the config.
    """
    folder = resolve(path)
    fields = read_config(folder)
    kind = str(fields.get("model_type"))
    if kind == MaskedConfig.model_type:
        model = load_pretrained(MaskedModel, folder, **({} if dtype is None else {"dtype": dtype}))
        assert isinstance(model, MaskedModel)
        return model.eval()
    if kind.lower() not in FORMATS:
        raise ZerodraftError(
            f"'{folder}' holds a model of type '{kind}'; the masked diffusion models that can be loaded are Dream and "
            f"DiffuCoder ('Dream'), LLaDA ('llada') and our own ('{MaskedConfig.model_type}')."
        )
    form = FORMATS[kind.lower()]
    with reading(f"'{folder / 'config.json'}'", f"is not of the '{kind}' kind that is known", ours=True):
        config = form.config(fields)
    check_depth(config, folder)
    with reading(f"'{folder / 'config.json'}'", "describes no model that can be built"), torch.device("meta"):
        model = MaskedModel(config)
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise ZerodraftError(
            f"'{folder / 'config.json'}' says mask_token_id={config.mask_token_id}, but the embedding has "
            f"{config.vocab_size} rows: set the mask token of this checkpoint."
        )
    return _fill(model, form, folder, dtype)


def _fill(model: MaskedModel, form: Format, folder: Path, dtype: torch.dtype | None) -> MaskedModel:
    """Put the weights of a directory into a model that has none yet."""
    config = model.config
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    for name, tensor in read_tensors(folder):
        ours = form.tensor(name)
        if ours is None or (config.tie_word_embeddings and ours == "lm_head.weight"):
            continue
        if ours not in shapes:
            raise ZerodraftError(
                f"'{folder}' holds a tensor '{name}' that its config.json does not provide for: it is of another kind."
            )
        if tuple(tensor.shape) != shapes[ours]:
            raise ZerodraftError(
                f"'{name}' in '{folder}' has shape {tuple(tensor.shape)}, but config.json makes it {shapes[ours]}: the "
                "files do not belong together."
            )
        weights[ours] = tensor if dtype is None else tensor.to(dtype)
    missing = [name for name in shapes if name not in weights]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ZerodraftError(
            f"'{folder}' lacks the weights of '{missing[0]}'{more} (in our names): fetch the whole checkpoint."
        )
    check_finite(weights.items(), str(folder))
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    # its frequencies are computed, not stored, and were on the meta device
    model.rotary = rotary_of(config)
    return model.eval()


def _need(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise ZerodraftError(f"it has no '{name}'.")
    return fields[name]


def _refuse(fields: Fields, **known: Any) -> None:
    """Raise for a field whose value asks for something that the network does not compute."""
    for name, value in known.items():
        found = fields.get(name)
        if found is not None and found != value:
            raise ZerodraftError(f"'{name}' is {found!r}, and only {value!r} is supported.")
