"""`from_pretrained` that refuses what transformers would only warn about: weights missing, misshapen, or not finite."""

from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from zerodraft.errors import ZerodraftError


def load_pretrained(auto_class: Any, name: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a model by a class with `from_pretrained` (an `AutoModelForCausalLM`, a `ZttForCausalLM`), from safetensors
    alone and without running code that lies beside them.

    Args:
        auto_class: Whose `from_pretrained` to call.
        name: Local directory or hub id.
        **kwargs: Passed on; `dtype` defaults to that of the checkpoint.

    Raises:
        ZerodraftError: nothing to load there, a corrupted file, weights missing or of another shape, NaN or infinite.
    """
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False} | kwargs
    try:
        loaded = auto_class.from_pretrained(name, output_loading_info=True, **options)
    except ZerodraftError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ZerodraftError(f"The model {str(name)!r} could not be loaded: {_first_sentence(error)}") from error
    model, info = loaded
    for problem, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        if wrong := sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[problem]):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ZerodraftError(
                f"The checkpoint {str(name)!r} {what} {wrong[0]!r}{more}: it does not fit its config.json; save it "
                "again from the whole model."
            )
    check_finite(model.named_parameters(), str(name))
    return model


def check_finite(tensors: Iterable[tuple[str, Tensor]], owner: str) -> None:
    """Raise unless every weight is a finite number."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32)) or torch.isfinite(tensor).all()):
            raise ZerodraftError(f"The weight {name!r} of {owner!r} holds NaN or infinity: the checkpoint is damaged.")


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."
