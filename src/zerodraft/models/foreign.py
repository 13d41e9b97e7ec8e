"""Models in other forms than a directory of safetensors: GGUF files and LoRA adapters, made into one once and kept.

What is made lies in the cache under the hash of what it was made from, as a short name's model does (`build_once`).
"""

import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError, reading, why
from zerodraft.common.files import check_regular, read_json
from zerodraft.models.cache import build_once, default_cache_dir, sha256_of
from zerodraft.models.wheel import check_gguf, dequantise

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter instead of a model."""
    return (path / ADAPTER).is_file()


def from_gguf(file: Path, cache: Path | None = None) -> Path:
    """The directory of the model in a GGUF file, dequantised to float32.

    Raises:
        ZerodraftError: the gguf package is missing, or the file is no GGUF of a kind that transformers reads.
    """
    check_gguf()
    check_regular(file, "GGUF file")
    digest = sha256_of(file)
    return build_once((cache or default_cache_dir()) / f"gguf-{digest[:24]}", partial(_dequantised, file, digest))


def _dequantised(file: Path, digest: str, staging: Path) -> dict[str, Any]:
    logger.info("dequantising %s (once; a minute, or several where the vocabulary is large)", file)
    # beside the file there may be others that transformers would read as the model's
    alone = staging / "unpack"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(file.resolve())
    try:
        with reading("It"):
            versions = dequantise(alone / "model.gguf", staging)
    except ZerodraftError as error:
        reason = why(error.__cause__ or error)
        raise ZerodraftError(f"The GGUF file '{file}' could not be loaded: {reason}.") from error
    (alone / "model.gguf").unlink()
    alone.rmdir()
    return {"source": "gguf", "gguf": file.name, "gguf_sha256": digest, "versions": versions}


def from_adapter(folder: Path, base: Path, cache: Path | None = None) -> Path:
    """The directory of a base model with a LoRA adapter merged into its weights.

    Raises:
        ZerodraftError: the peft extra is missing, or the adapter does not fit the base model.
    """
    try:
        import peft  # noqa: F401  # told before anything is built
    except ImportError as error:
        raise ZerodraftError("LoRA adapters need the peft extra: pip install 'zerodraft[peft]'") from error
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    for file in files:
        check_regular(file)
    weights = sorted([*base.glob("*.json"), *base.glob("*.safetensors")])
    about = [sha256_of(*files), str(base.resolve()), [(file.name, file.stat().st_size) for file in weights]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return build_once((cache or default_cache_dir()) / f"lora-{digest[:24]}", partial(_merged, folder, base))


def adapter_base(folder: Path) -> str:
    """What an adapter calls its base model."""
    base = read_json(folder / ADAPTER, "adapter configuration").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ZerodraftError(f"'{folder / ADAPTER}' names no base model: set base_model_name_or_path.")
    # a relative path is meant from where the adapter lies, or from where it was trained
    beside = folder / base
    return os.fspath(beside) if not Path(base).exists() and beside.is_dir() else base


def _merged(folder: Path, base: Path, staging: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from zerodraft.models.loading import load_pretrained, load_tokenizer_files

    logger.info("merging the adapter in %s into %s (once)", folder, base)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ZerodraftError(f"'{folder}' has no adapter_model.safetensors: save the adapter as safetensors.")
    model: Any = load_pretrained(AutoModelForCausalLM, base)
    with reading(f"The adapter in '{folder}'"):
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        merged.save_pretrained(staging)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))
    load_tokenizer_files(folder if own else base).save_pretrained(staging)
    return {"source": "adapter", "adapter": folder.name, "base": os.fspath(base)}
