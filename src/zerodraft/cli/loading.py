"""Getting a model and its tokenizer for a command, with one clear sentence for whatever is wrong with them."""

import json
from pathlib import Path
from typing import Any

from zerodraft.errors import ZerodraftError


def load_ztt(name: str) -> tuple[Any, Path]:
    """The Zero Token Transformer at a path, hub id or short name, in evaluation mode, and its directory."""
    from zerodraft import ZttForCausalLM
    from zerodraft.targets import resolve

    path = resolve(name)
    kind = model_type(path)
    if kind != "ztt":
        raise ZerodraftError(
            f"'{name}' is a plain {kind} model, not a Zero Token Transformer: convert it first with "
            f"'zerodraft convert {name} --output DIR'"
        )
    try:
        return ZttForCausalLM.from_pretrained(path).eval(), path
    except ZerodraftError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise ZerodraftError(f"the checkpoint in '{path}' cannot be loaded: {_first_sentence(error)}") from error


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The tokenizer beside a model, checked to fit the model's vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ZerodraftError(
            f"no tokenizer can be loaded from '{path}' ({_first_sentence(error)}): put its tokenizer.json there"
        ) from error
    if len(tokenizer) > vocab_size:
        raise ZerodraftError(
            f"the tokenizer in '{path}' has {len(tokenizer)} tokens and the model's vocabulary only {vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def model_type(path: Path) -> str:
    """What the `config.json` of a model directory says that it is."""
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ZerodraftError(
            f"'{path / 'config.json'}' is not a model configuration: {_first_sentence(error)}"
        ) from error


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
