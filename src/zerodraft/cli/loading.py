"""Getting a model and its tokenizer for a command; whatever is wrong with them is one clear sentence."""

from pathlib import Path
from typing import Any, Literal

from zerodraft.errors import ZerodraftError
from zerodraft.files import read_json

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


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model."""
    from zerodraft.training import tokenizer

    return tokenizer.load_tokenizer(path)


def check_tokens(largest: int, model: Any, what: str) -> None:
    """Raises for a token beyond a model's embedding. Some tokenizers have a few tokens more than their model has rows,
    so only a text that holds one of these cannot be read."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ZerodraftError(
            f"{what} holds token {largest}, but the model's vocabulary has {rows}: take that token out, or the "
            "tokenizer that belongs to the model"
        )


def model_type(path: Path) -> str:
    """What the `config.json` of a model directory says that it is."""
    kind = read_json(path / "config.json", "configuration").get("model_type")
    if not isinstance(kind, str):
        raise ZerodraftError(f"'{path / 'config.json'}' is not a model configuration: it has no model_type")
    return kind
