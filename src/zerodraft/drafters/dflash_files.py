"""DFlash checkpoints on disk: three layouts of one network, read into `DFlashModel` and written from it.

| layout | `model_type` | read by |
| --- | --- | --- |
| ours | `zerodraft_dflash` | this package; what training writes |
| z-lab's | that of the layers (`qwen3`), architecture `DFlashDraftModel` | vLLM, SGLang, z-lab's code, llama.cpp |
| transformers' | `muse_glimmer_assistant`, architecture `MuseGlimmerAssistantModel` | transformers 5.23, vLLM |

They differ in names alone: the fusing projection and its norm are `fc` and `hidden_norm` for us and z-lab, `encoder.fc`
and `encoder.output_norm_enc` for transformers; z-lab keeps the mask token and the tapped layers in `dflash_config`,
transformers at the top. No layout holds embeddings or an LM head: they are the target's.
"""

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zerodraft.drafters.dflash_model import FULL, DFlashConfig, DFlashModel, default_taps
from zerodraft.errors import ZerodraftError
from zerodraft.ztt.loading import check_finite

Layout = Literal["transformers", "z-lab"]

ZLAB, TRANSFORMERS = "DFlashDraftModel", "MuseGlimmerAssistantModel"
TO_TRANSFORMERS = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
FROM_TRANSFORMERS = {theirs: ours for ours, theirs in TO_TRANSFORMERS.items()}

SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "hidden_act", "max_position_embeddings", "layer_types", "sliding_window",
)  # fmt: skip
"""Fields of the configuration that are called the same everywhere."""


def is_dflash(path: str | PathLike[str]) -> bool:
    """Whether the directory's `config.json` is that of a DFlash drafter in any layout."""
    try:
        fields = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and _layout(fields) is not None


def load_dflash(path: str | PathLike[str]) -> DFlashModel:
    """Reads a drafter in any layout, in float32.

    Raises:
        ZerodraftError: no DFlash drafter there, a damaged one, or one with parts that this network does not have.
    """
    folder = Path(path)
    fields, tensors = _read_config(folder), _read_tensors(folder)
    layout = _layout(fields)
    if layout is None:
        raise ZerodraftError(
            f"'{folder}' holds no DFlash drafter: its config.json names neither the architecture {ZLAB} nor "
            f"{TRANSFORMERS} nor the model type {DFlashConfig.model_type}."
        )
    try:
        config = DFlashConfig.from_dict(fields) if layout == "ours" else config_of(fields, layout)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split()).rstrip(".")
        raise ZerodraftError(f"The config.json in '{folder}' is not that of a DFlash drafter: {reason}.") from error
    model = DFlashModel(config)
    tensors = {FROM_TRANSFORMERS.get(name, name): value.float() for name, value in tensors.items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ZerodraftError(
            f"The DFlash drafter '{folder}' has {name!r} of shape {found.get(name, 'none')}, expected "
            f"{expected.get(name, 'none')}: its weights do not fit its config.json, or are of a later kind."
        )
    check_finite(tensors.items(), str(folder))
    model.load_state_dict(tensors)
    return model.eval()


def config_of(fields: Mapping[str, Any], layout: str) -> DFlashConfig:
    """Our configuration from a published one."""
    inner = fields.get("dflash_config") or {}
    same = {name: fields[name] for name in SAME if fields.get(name) is not None}
    heads = fields["num_attention_heads"]
    theirs = layout == "transformers"
    rope = fields.get("rope_parameters") or {
        "rope_type": "default",
        **(fields.get("rope_scaling") or {}),
        "rope_theta": fields.get("rope_theta", 500000.0 if theirs else 1000000.0),
    }
    if "layer_types" not in same:
        sliding = theirs or inner.get("use_swa")
        same["layer_types"] = ["sliding_attention" if sliding else FULL] * fields["num_hidden_layers"]
    causal = fields.get("is_causal", inner.get("causal"))
    count = fields.get("num_target_layers") or inner.get("num_target_layers") or 0
    ids = fields.get("target_layer_ids") or inner.get("target_layer_ids")
    return DFlashConfig(
        **{
            "num_key_value_heads": heads,
            "head_dim": fields["hidden_size"] // heads,
            "sliding_window": inner.get("swa_window_size"),
            **same,
            "attention_bias": bool(fields.get("attention_bias", False)),
            "rope_parameters": rope,
            "causal_sliding": not theirs if causal is None else bool(causal),
            "block_size": int(fields.get("block_size") or inner.get("block_size") or 16) - 1,
            "mask_token_id": int(fields["mask_token_id"] if "mask_token_id" in fields else inner["mask_token_id"]),
            "target_layer_ids": ids or default_taps(count, fields["num_hidden_layers"]),
            "num_target_layers": count,
            "vocab_size": fields.get("vocab_size") or 0,
        }
    )


def export_dflash(model: DFlashModel, folder: str | PathLike[str], layout: Layout = "transformers") -> None:
    """Writes a drafter for other runtimes: `config.json` and `model.safetensors` in a new or empty directory.

    `transformers` serves vLLM and transformers 5.23 (`generate(assistant_model=..., speculation_type="dflash")`),
    `z-lab` vLLM and SGLang.

    Raises:
        ZerodraftError: the directory holds something, or the layout cannot hold this drafter.
    """
    config, out = model.config, Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZerodraftError(f"'{out}' is there already and not an empty directory: choose another place to export to.")
    if layout == "transformers" and config.attention_bias:
        raise ZerodraftError("transformers' DFlash layers have no biases, this drafter's have: export it as z-lab.")
    if layout == "transformers" and config.causal_sliding and config.layer_types != [FULL] * len(config.layer_types):
        raise ZerodraftError(
            "transformers' sliding DFlash layers see in both directions, this drafter's only look back: export it as "
            "z-lab."
        )
    names = TO_TRANSFORMERS if layout == "transformers" else {}
    tensors = {
        names.get(name, name): value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()
    }
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, out / "model.safetensors")
    text = json.dumps(published_config(config, layout, tensors["norm.weight"].dtype), indent=2) + "\n"
    # last: a directory without it is not taken for a drafter
    partial = out / "config.json.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out / "config.json")


def published_config(config: DFlashConfig, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the `config.json` of an exported drafter says.

    Each runtime reads its own places, so that what one ignores another needs: vLLM takes `vocab_size` (the target's),
    `is_causal` and `dflash_config` from the transformers layout too.
    """
    sliding = config.layer_types != [FULL] * len(config.layer_types)
    fields = {name: getattr(config, name) for name in SAME if getattr(config, name) is not None}
    fields |= {
        "architectures": [TRANSFORMERS if layout == "transformers" else ZLAB],
        "model_type": "muse_glimmer_assistant" if layout == "transformers" else "qwen3",
        "dtype": str(dtype).removeprefix("torch."),
        "attention_dropout": 0.0,
        "block_size": config.block_size + 1,
        "vocab_size": config.vocab_size,
        "num_target_layers": config.num_target_layers,
        "is_causal": sliding and config.causal_sliding,
        "rope_parameters": config.rope_parameters,
        "dflash_config": {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids},
    }
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
    architectures = fields.get("architectures") or []
    if ZLAB in architectures:
        return "z-lab"
    if TRANSFORMERS in architectures or fields.get("model_type") == "muse_glimmer_assistant":
        return "transformers"
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZerodraftError(f"'{folder}' has no readable config.json: {error}") from error
    if not isinstance(fields, dict):
        raise ZerodraftError(f"The config.json in '{folder}' is no JSON object.")
    return fields


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights, from one file or the parts that an index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        names = ["model.safetensors"]
        if not single.is_file() and index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= load_file(folder / Path(name).name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ZerodraftError(f"The drafter in '{folder}' could not be loaded: {error}") from error
    return tensors
