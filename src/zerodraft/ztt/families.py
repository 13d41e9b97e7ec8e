"""What the cycling needs to know about a decoder family of transformers, found by looking at the model itself.

Embeddings, masks, rotary modules, final norm and LM head are driven by the family's own forward pass. Only the list of
decoder layers and, inside a layer, the attention and the module whose output is the FFN's residual are located here.
A family that lacks one of them is refused with a sentence that says what is missing.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.caches import argument_of, cache_argument

# Where the residual branch of the FFN ends, first match wins: post-norm families, most families, OPT.
_FFN_OUTPUTS = ("post_feedforward_layernorm", "mlp", "feed_forward", "fc2")

# What families call their rotation of queries and keys.
_ROTATION = "apply_rotary_pos_emb"


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """The places in a family's model that cycling touches.

    Attributes:
        path: Dotted name of the list of decoder layers.
        cache_argument: Name of the layers' cache argument.
        model_cache_argument: Name of the model's own.
        arguments: Names of the layers' arguments after the hidden states, in order.
        layer_types: Type of each stored layer where the rotary module wants it (Gemma 3), else None.
        rotations: `rotary_of` each stored layer.
    """

    path: str
    cache_argument: str
    model_cache_argument: str
    arguments: tuple[str, ...]
    layer_types: tuple[str, ...] | None
    rotations: tuple[Callable | None, ...]


def build_family(auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The family's own model, as one of transformers' `AutoModel...` classes makes it from its configuration.

    Raises:
        ZerodraftError: transformers has no such model, or its attention does not go through the AttentionInterface.
    """
    try:
        return auto_class.from_config(config, trust_remote_code=False)
    except ValueError as error:
        reason = re.split(r"\.?\s*\n|\. ", str(error), maxsplit=1)[0].rstrip(".")
        raise ZerodraftError(f"{type(config).__name__} cannot be cycled: {reason}.") from error
    except KeyError as error:  # a family that chooses among classes of its own by the name of the attention
        raise ZerodraftError(
            f"{type(config).__name__} cannot be cycled: its attention does not go through transformers' "
            "AttentionInterface."
        ) from error


def find_parts(model: PreTrainedModel) -> DecoderParts:
    """Locate the decoder layers of a model and check that they can be cycled.

    Raises:
        ZerodraftError: something that cycling needs is missing; the sentence says what.
    """
    family = type(model).__name__
    found = layer_lists(model)
    if len(found) != 1:
        raise ZerodraftError(
            f"{family} cannot be cycled: expected one list of {model.config.num_hidden_layers} decoder layers "
            f"(GradientCheckpointingLayer), found {len(found)}."
        )
    path = found[0]
    layers = list(model.get_submodule(path).children())
    for layer in layers:
        if problem := _problem(layer):
            raise ZerodraftError(f"{family} cannot be cycled: {problem}.")
    if getattr(model.config, "layerdrop", 0.0) > 0:
        raise ZerodraftError(f"{family} cannot be cycled: it drops layers at random in training (layerdrop).")
    parameters, cache = inspect.signature(layers[0].forward).parameters, cache_argument(layers[0].forward)
    assert cache is not None
    positional = tuple(n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    rotary = rotary_module(model, path)
    by_type = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
    return DecoderParts(
        path=path,
        cache_argument=cache,
        model_cache_argument=argument_of(model),
        arguments=positional[1:],
        layer_types=tuple(model.config.layer_types) if by_type else None,
        rotations=tuple(map(rotary_of, layers)),
    )


def layer_lists(model: PreTrainedModel) -> list[str]:
    """Dotted names of the lists that hold all decoder layers of a model; most have one."""
    return [
        path
        for path, child in model.named_modules()
        if isinstance(child, nn.ModuleList)
        and len(child) == model.config.num_hidden_layers > 0
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
    ]


def rotary_module(model: nn.Module, path: str) -> nn.Module | None:
    """The rotary module that stands beside the list of decoder layers, or None."""
    return getattr(model.get_submodule(path.rpartition(".")[0]), "rotary_emb", None)


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and hasattr(module, "layer_idx")


def _problem(layer: nn.Module) -> str:
    """What keeps a decoder layer from being cycled; empty if nothing does."""
    if cache_argument(layer.forward) is None:
        return "its layers take no key-value cache"
    attention = {name: child for name, child in layer.named_children() if _is_attention(child)}
    if len(attention) != 1:
        return f"its layers have {len(attention)} self-attention modules instead of one"
    name, module = attention.popitem()
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(type(module).forward).__code__.co_names:
        return "its attention does not go through transformers' AttentionInterface"
    if not _hands_kwargs_to(name, layer):
        return "its layers hand no **kwargs to the attention"
    others = (m for m in layer.modules() if m is not layer and m is not module)
    if keeper := next((type(m).__name__ for m in others if cache_argument(m.forward)), None):
        return f"its layers keep more than keys and values in the cache ({keeper})"
    return ""


def _hands_kwargs_to(name: str, layer: nn.Module) -> bool:
    """Whether a layer calls its child `name` with the `**kwargs` that it was called with; some drop them."""
    variable = inspect.getfullargspec(inspect.unwrap(type(layer).forward)).varkw
    for node in ast.walk(_source(layer)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            unpacked = [keyword.value for keyword in node.keywords if keyword.arg is None]
            return any(isinstance(value, ast.Name) and value.id == variable for value in unpacked)
    return False


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention module of a decoder layer."""
    return next(child for child in layer.children() if _is_attention(child))


def ffn_output_of(layer: nn.Module) -> str:
    """Name of the module whose output a decoder layer adds to the residual stream as its FFN's.

    Raises:
        ZerodraftError: none of the known places exists.
    """
    for name in _FFN_OUTPUTS:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise ZerodraftError(
        f"{type(layer).__name__} has none of {', '.join(_FFN_OUTPUTS)}, so its FFN cannot be gated; set ffn_gate=False."
    )


def rotary_of(layer: nn.Module) -> Callable | None:
    """The function `(q, k, cos, sin) -> (q, k)` with which a layer rotates, or None if it has no rotary positions."""
    attention = attention_of(layer)
    rotate = _rotation(attention)
    if rotate is None or not _rotates(attention):
        return None
    width = getattr(attention, "rotary_ndims", None)
    # Some families cut the rotated part of a head out themselves, before they call the function (Phi, StableLM).
    return rotate if width is None else partial(_rotate_part, rotate, width)


def _rotates(attention: nn.Module) -> bool | None:
    """Whether an attention module rotates; None if that is not known.

    In many families only some layers do, and every family's code asks the module in words of its own (`use_rope`,
    `is_local_attention`, `sliding_window is not None`). So those words are what is asked here.
    """
    for node in ast.walk(_source(attention)):
        inside = [n for statement in node.body for n in ast.walk(statement)] if isinstance(node, ast.If) else []
        if isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == _ROTATION for n in inside):
            condition = compile(ast.Expression(node.test), type(attention).__name__, "eval")
            try:
                if not eval(condition, {"self": attention, "position_embeddings": ()}):
                    return False
            except (AttributeError, NameError):
                return None
    return True


def _source(module: nn.Module) -> ast.Module:
    """The code of a module's forward pass."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))


def _rotation(attention: nn.Module) -> Callable | None:
    """The function with which a family rotates, for queries and keys even if it takes one of them (Gemma 3n)."""
    rotate = getattr(sys.modules[type(attention).__module__], _ROTATION, None)
    if rotate is None or list(inspect.signature(rotate).parameters)[1] != "cos":
        return rotate
    return partial(_rotate_each, rotate)


def check_zero_rope(zero_rope: str, layer: nn.Module) -> None:
    """Raise `ZerodraftError` for a zero key that is to move along where it is not known how positions rotate heads."""
    if zero_rope == "origin":
        return
    attention = attention_of(layer)
    handed = "position_embeddings" in inspect.signature(layer.forward).parameters
    problems = {
        "has latent attention, in whose keys only the end is rotated": hasattr(attention, "qk_rope_head_dim"),
        "is not handed the rotation of its positions": not handed and _rotation(attention) is not None,
        "rotates its heads in a form of its own": handed and _rotation(attention) is None,
        "rotates its heads under a condition that is not known": _rotates(attention) is None,
    }
    for problem, present in problems.items():
        if present:
            raise ZerodraftError(
                f'{type(layer).__name__} {problem}: zero_rope="{zero_rope}" is not supported for it; use "origin".'
            )


def _rotate_each(rotate: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _rotate_part(rotate: Callable, width: int, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = rotate(q[..., :width], k[..., :width], cos, sin)
    return torch.cat([turned[0], q[..., width:]], -1), torch.cat([turned[1], k[..., width:]], -1)


def makes_masks(layer: nn.Module) -> bool:
    """Whether a layer's attention computes its mask from its inputs (Doge)."""
    return hasattr(attention_of(layer), "prepare_dynamic_mask")


def kv_shape(config: PreTrainedConfig, layer: nn.Module) -> tuple[int, int]:
    """Number and size of the keys that the attention function gets from a layer, for each token."""
    attention, heads = attention_of(layer), config.num_attention_heads
    latent = getattr(attention, "qk_head_dim", None)
    if latent is not None:  # latent attention (DeepSeek): keys are made for every query head, whatever the config says
        return heads, latent
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    # Asked of the layer: families without grouped queries ignore a num_key_value_heads in their configuration.
    return heads // getattr(attention, "num_key_value_groups", 1), head_dim


def shared_kv_shape(config: PreTrainedConfig, layers: Sequence[nn.Module]) -> tuple[int, int]:
    """`kv_shape` of layers that all have the same.

    Raises:
        ZerodraftError: they have not.
    """
    shapes = {kv_shape(config, layer) for layer in layers}
    if len(shapes) != 1:
        raise ZerodraftError(
            f"The layers of {type(config).__name__} have keys of different numbers or sizes "
            f"({', '.join(f'{kv} of {d}' for kv, d in sorted(shapes))}), which zero tokens do not support; set "
            "zero_tokens=False for this family."
        )
    return shapes.pop()
