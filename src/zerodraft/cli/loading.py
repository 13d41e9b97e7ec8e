"""Getting a model and its tokenizer for a command; whatever is wrong with them is one clear sentence."""

import json
from pathlib import Path
from typing import Any, Literal

from zerodraft.errors import ZerodraftError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What a model computes in; auto: what its checkpoint is stored in."""


def load_ztt(name: str) -> tuple[Any, Path]:
    """The Zero Token Transformer at a path, hub id or short name, ready to run, and its directory."""
    from zerodraft import ZttForCausalLM
    from zerodraft.ztt.loading import load_pretrained

    path = find_ztt(name)
    return load_pretrained(ZttForCausalLM, path).to(default_device()).eval(), path


def find_ztt(name: str) -> Path:
    """The directory of the Zero Token Transformer at a path, hub id or short name."""
    from zerodraft.targets import resolve

    path = resolve(name)
    kind = model_type(path)
    if kind != "ztt":
        raise ZerodraftError(
            f"'{name}' is a plain {kind} model, not a Zero Token Transformer: convert it first with "
            f"'zerodraft convert {name} --output DIR'"
        )
    return path


def default_device() -> Any:
    """The accelerator if there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def load_tokenizer_for(model: Any, path: Path) -> Any:
    """The tokenizer beside a model, checked to fit the model's vocabulary."""
    from zerodraft.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    if len(tokenizer) > model.config.vocab_size:
        raise ZerodraftError(
            f"the tokenizer in '{path}' has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return tokenizer


def model_type(path: Path) -> str:
    """What the `config.json` of a model directory says that it is."""
    file = path / "config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZerodraftError(f"'{file}' is not a model configuration: it has no model_type") from error
