"""DFlash checkpoints on disk: three layouts of one network, read into `DFlashModel` and written from it.

| layout | `model_type` | read by |
| --- | --- | --- |
| ours | `zerodraft_dflash` | this package; what training writes |
| z-lab's | that of the layers (`qwen3`), architecture `DFlashDraftModel` | vLLM, SGLang, z-lab's code, llama.cpp |
| transformers' | `muse_glimmer_assistant`, architecture `MuseGlimmerAssistantModel` | transformers 5.23, vLLM |

The fusing projection and its norm are `fc` and `hidden_norm` for us and z-lab, `encoder.fc` and
`encoder.output_norm_enc` for transformers; z-lab keeps the mask token and the tapped layers in `dflash_config`,
transformers at the top. No layout holds embeddings or an LM head: they are the target's.

Three things are read differently. *Direction*: transformers' layers see both ways; z-lab's sliding ones look back only,
unless `is_causal` (or `causal` in `dflash_config`) says otherwise, which it does for all layers at once. *Windows* in
both directions: `w` places to either side for transformers and us, `w - 1` for z-lab and vLLM. *Embeddings*:
transformers scales them as the target does, z-lab by `input_embedding_scale` alone.
"""

import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.common.files import read_json
from zerodraft.common.outputs import new_directory
from zerodraft.drafters.dflash_model import FULL, SLIDING, DFlashConfig, DFlashModel, default_taps
from zerodraft.drafters.rotary import rope_parameters, rotary_of
from zerodraft.models.loading import check_depth, check_finite, read_config, read_tensors
from zerodraft.models.resolve import resolve

logger = logging.getLogger(__name__)

Layout = Literal["transformers", "z-lab"]

ZLAB, TRANSFORMERS = "DFlashDraftModel", "MuseGlimmerAssistantModel"
TO_TRANSFORMERS = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
FROM_TRANSFORMERS = {theirs: ours for ours, theirs in TO_TRANSFORMERS.items()}

SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "hidden_act", "max_position_embeddings",
)  # fmt: skip
"""Fields of the configuration that are called the same everywhere."""

ONLY: dict[str, Any] = {"rope_is_neox_style": True, "is_neox_style": True, "logit_scale": 1}
"""Fields of which this network knows one value."""

LATER_PARTS = {"conv_kernel_size": "convolutions", "selector_rank": "a candidate selector"}
"""What DFlash 2 adds, by the field that says so."""


def is_dflash(path: str | PathLike[str]) -> bool:
    """Whether the directory's `config.json` is that of a DFlash drafter of any kind, even one that is not supported."""
    try:
        fields = read_json(Path(path) / "config.json", "configuration")
    except ZerodraftError:
        return False
    return bool(_layout(fields) or _later_kind(fields))


def load_dflash(path: str | PathLike[str]) -> DFlashModel:
    """Reads a drafter in any layout, in float32, from its directory, a training run's folder or a hub id.

    Raises:
        ZerodraftError: no DFlash drafter there, a damaged one, or one with parts that this network does not have.
    """
    folder = resolve(path)
    fields, tensors = read_config(folder), dict(read_tensors(folder))
    layout = _layout(fields)
    if layout is None and (kind := _later_kind(fields)):
        inner = fields.get("dflash_config") or {}
        parts = " and ".join(part for name, part in LATER_PARTS.items() if name in inner or name in fields)
        raise ZerodraftError(
            f"The drafter '{folder}' is a {kind}, a kind of DFlash drafter that is not supported"
            f"{parts and f' (it has {parts})'}: take one with the architecture {ZLAB} or {TRANSFORMERS}."
        )
    if layout is None:
        raise ZerodraftError(
            f"'{folder}' holds no DFlash drafter: its config.json names neither the architecture {ZLAB} nor "
            f"{TRANSFORMERS} nor the model type {DFlashConfig.model_type}."
        )
    subject, outcome = f"The config.json in '{folder}'", "is not that of a DFlash drafter that can be loaded"
    with reading(subject, outcome, ours=True):
        config = DFlashConfig.from_dict(fields) if layout == "ours" else config_of(fields, layout)
    check_depth(config, folder)
    with reading(subject, outcome), torch.device("meta"):
        # of sizes that the weights do not have nothing is allocated
        model = DFlashModel(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = {FROM_TRANSFORMERS.get(name, name): value.float() for name, value in tensors.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ZerodraftError(
            f"The DFlash drafter '{folder}' has {name!r} of shape {found.get(name, 'none')}, expected "
            f"{expected.get(name, 'none')}: its weights do not fit its config.json, or are of a later kind."
        )
    check_finite(tensors.items(), str(folder))
    model.load_state_dict(tensors, assign=True)
    # what is not stored was on the meta device too
    model.rotary, model.mask_embedding = rotary_of(config), torch.zeros(config.hidden_size)
    return model.eval()


def config_of(fields: Mapping[str, Any], layout: str) -> DFlashConfig:
    """Our configuration from a published one.

    Raises:
        KeyError: a field is missing.
        ValueError, ZerodraftError: one has a value that asks for something else than this network.
    """
    theirs = layout == "transformers"
    outer = {name: value for name, value in fields.items() if value is not None}
    inner = {name: value for name, value in outer.get("dflash_config", {}).items() if value is not None}
    # where both places name a value, transformers reads the top alone, the others prefer `dflash_config`
    both = inner | outer if theirs else outer | inner
    if "transformer_layer_config" in both:
        raise ValueError("it is in the layout of speculators (transformer_layer_config), which is not supported")
    for name, only in ONLY.items():
        if both.get(name, only) != only:
            raise ValueError(f"{name} is {both[name]}, and only {only} is supported")
    heads, cap = outer["num_attention_heads"], both.get("final_logit_softcapping")
    count = both.get("num_target_layers", 0)
    scale = both.get("input_embedding_scale", None if theirs else 1.0)
    return DFlashConfig(
        **{
            "num_key_value_heads": heads,
            "head_dim": outer["hidden_size"] // heads,
            **{name: outer[name] for name in SAME if name in outer},
            **_attention(outer, inner, theirs),
            "attention_bias": bool(outer.get("attention_bias", False)),
            "rope_parameters": rope_parameters(outer, theta=500000.0 if theirs else 1000000.0),
            "block_size": int(both.get("block_size", 16)) - 1,
            "mask_token_id": int(both["mask_token_id"]),
            "target_layer_ids": both.get("target_layer_ids") or default_taps(count, outer["num_hidden_layers"]),
            "num_target_layers": count,
            "vocab_size": outer.get("vocab_size", 0),
            "embedding_scale": None if scale is None else float(scale),
            "output_multiplier": float(both.get("output_multiplier", 1.0)),
            "final_logit_softcapping": float(cap) if cap and cap > 0 else None,
        }
    )


def _attention(outer: Mapping[str, Any], inner: Mapping[str, Any], theirs: bool) -> dict[str, Any]:
    """Who sees whom: the fields `layer_types`, `sliding_window` and `causal_sliding` of our configuration."""
    kinds, count = outer.get("layer_types"), outer["num_hidden_layers"]
    if not theirs and not kinds and outer.get("use_sliding_window"):
        raise ValueError("use_sliding_window is set without layer_types, and no layer says whether it slides")
    # layers that slide by this alone see in both directions
    forced = not theirs and bool(inner.get("use_swa")) and SLIDING not in (kinds or ())
    if forced or not kinds:
        kinds = [SLIDING if forced or theirs else FULL] * count
    said = outer.get("is_causal", inner.get("causal"))
    if said and (theirs or FULL in kinds):
        what = "layers of this layout see" if theirs else "full layers are only supported when they see"
        raise ValueError(f"{'is_causal' if 'is_causal' in outer else 'causal'} is true, but {what} in both directions")
    causal = not theirs and not forced if said is None else bool(said)
    window, window_swa = outer.get("sliding_window"), inner.get("swa_window_size")
    if window is None or (window_swa is not None and not theirs):
        window = window_swa
    if window is not None and SLIDING in kinds and not theirs and not causal:
        window -= 1
    return {"layer_types": kinds, "sliding_window": window, "causal_sliding": causal}


def export_dflash(model: DFlashModel, folder: str | PathLike[str], layout: Layout = "transformers") -> None:
    """Writes a drafter for other runtimes: `config.json` and `model.safetensors` in a new or empty directory.

    `transformers` serves vLLM and transformers 5.23 (`generate(assistant_model=..., speculation_type="dflash")`),
    `z-lab` vLLM and SGLang, which warns of layers that SGLang would run differently.

    Raises:
        ZerodraftError: the directory holds something, or the layout cannot hold this drafter.
    """
    config = model.config
    if layout == "transformers" and config.attention_bias:
        raise ZerodraftError("transformers' DFlash layers have no biases, this drafter's have: export it as z-lab.")
    if layout == "transformers" and config.causal_sliding and config.layer_types != [FULL] * len(config.layer_types):
        raise ZerodraftError(
            "transformers' sliding DFlash layers see in both directions, this drafter's only look back: export it as "
            "z-lab."
        )
    if layout == "transformers" and (config.output_multiplier != 1 or config.final_logit_softcapping is not None):
        raise ZerodraftError(
            "transformers' DFlash drafters have no output_multiplier and no final_logit_softcapping, this one has: "
            "export it as z-lab."
        )
    if layout == "z-lab" and config.looks_ahead:
        logger.warning(
            "This drafter's sliding layers see in both directions. vLLM runs them so (is_causal: false), but SGLang's "
            "only look back, whatever the files say: there its drafts will be worse."
        )
    names = TO_TRANSFORMERS if layout == "transformers" else {}
    tensors = {
        names.get(name, name): value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()
    }
    text = json.dumps(published_config(config, layout, tensors["norm.weight"].dtype), indent=2) + "\n"
    with new_directory(folder) as out:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(text, encoding="utf-8")


def published_config(config: DFlashConfig, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the `config.json` of an exported drafter says.

    Each runtime reads its own places, so that what one ignores another needs: vLLM takes `vocab_size` (the target's),
    `is_causal` and `dflash_config` from the transformers layout too.
    """
    sliding, window = SLIDING in config.layer_types, config.sliding_window
    inner: dict[str, Any] = {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
    if config.embedding_scale is not None:
        inner["input_embedding_scale"] = config.embedding_scale
    if config.output_multiplier != 1:
        inner["output_multiplier"] = config.output_multiplier
    if config.final_logit_softcapping is not None:
        inner["final_logit_softcapping"] = config.final_logit_softcapping
    fields: dict[str, Any] = {name: getattr(config, name) for name in SAME}
    fields |= {
        "architectures": [TRANSFORMERS if layout == "transformers" else ZLAB],
        "model_type": "muse_glimmer_assistant" if layout == "transformers" else "qwen3",
        "dtype": str(dtype).removeprefix("torch."),
        "attention_dropout": 0.0,
        "block_size": config.block_size + 1,
        "vocab_size": config.vocab_size,
        "num_target_layers": config.num_target_layers,
        "layer_types": config.layer_types,
        "rope_parameters": config.rope_parameters,
        "dflash_config": inner,
    }
    if not (sliding and config.causal_sliding):
        # true would make the full layers causal too; without the field sliding layers are, and full ones are not
        fields["is_causal"] = False
    if window is not None:
        fields["sliding_window"] = window + 1 if layout == "z-lab" and config.looks_ahead else window
    if layout == "transformers":
        # its class fills in numbers of another vocabulary where these are left out
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return fields | special | {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
    return fields | {
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": sliding,
        # older readers know the rotary base by its own name
        "rope_theta": config.rope_parameters.get("rope_theta"),
    }


def _layout(fields: Mapping[str, Any]) -> str | None:
    if fields.get("model_type") == DFlashConfig.model_type:
        return "ours"
    architectures = _architectures(fields)
    if ZLAB in architectures:
        return "z-lab"
    if TRANSFORMERS in architectures or fields.get("model_type") == "muse_glimmer_assistant":
        return "transformers"
    return None


def _architectures(fields: Mapping[str, Any]) -> list[str]:
    named = fields.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _later_kind(fields: Mapping[str, Any]) -> str | None:
    """An architecture that is called DFlash, but is none of those that can be loaded."""
    return next((name for name in _architectures(fields) if "dflash" in name.lower() and name != ZLAB), None)
