"""Rotary positions of a published drafter: what its `config.json` says, in the spelling of transformers 5.

Files of different years say the same in different words: `rope_scaling: {"type": "yarn", ...}` beside `rope_theta`,
`rope_scaling: {"rope_type": ...}`, or all of it in `rope_parameters`. transformers' own configuration reads them.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zerodraft.common.errors import ZerodraftError

# The fields that take part. The original length stands beside the others in Phi's files.
_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
)


DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
"""Where a configuration of ours says nothing."""


class ExactRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary positions whose frequencies stay in float32 when the network is brought to the target's dtype: rounded to
    16 bits they turn a position a few hundred tokens on by the wrong angle."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExactRotaryEmbedding":
        def keeping(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping, recurse)


def rotary_of(config: Any) -> ExactRotaryEmbedding:
    """Rotary positions, with whatever scaling the config asks for."""
    return ExactRotaryEmbedding(config)


def rope_parameters(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """`rope_parameters` of a published configuration.

    Args:
        fields: Its `config.json`.
        theta: The base where it names none.

    Raises:
        ZerodraftError: it asks for something else than one rotation of whole heads that transformers knows.
    """
    given: dict[str, Any] = {"rope_theta": theta} | {
        name: fields[name] for name in _FIELDS if fields.get(name) is not None
    }
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(given.get(name, {}), Mapping):
            raise ZerodraftError(f"'{name}' is {given[name]!r}, expected an object.")
    try:
        config = LlamaConfig(**copy.deepcopy(given))
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split()).rstrip(".")
        raise ZerodraftError(f"its rotary positions cannot be read: {reason}.") from error
    rope: dict[str, Any] = {name: value for name, value in (config.rope_parameters or {}).items() if name != "type"}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ZerodraftError(
            "'rope_parameters' has one entry for each kind of layer, and only one for all is supported."
        )
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    if rope["rope_type"] not in kinds:
        raise ZerodraftError(
            f"the rotary scaling {rope['rope_type']!r} is unknown, expected one of {', '.join(kinds)}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ZerodraftError(
            f"'partial_rotary_factor' is {rope['partial_rotary_factor']!r}, and only heads that are rotated whole are "
            "supported."
        )
    return rope
