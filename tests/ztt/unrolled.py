"""The oracle: a plain model of the family with one layer for every execution, and the zero token as a real token.

Nothing of the package's forward pass is used. The order of the layers is written down here a second time, attention is
written out with the zero key and a zero value put in front of the keys and values, and what happens between layers
(gates, input that is fed in again, scales, tokens that have left) are hooks.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from zerodraft import ZttConfig, ZttForCausalLM

NAME = "written_out_zero_token"


def written_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in which the zero token of `module` is a key like any other, seen by every query."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    zero_key: Tensor | None = getattr(module, "zero_key", None)
    mask = attention_mask
    if zero_key is not None:
        heads = zero_key.repeat_interleave(query.shape[1] // zero_key.shape[0], 0)
        front = heads[None, :, None].expand(key.shape[0], -1, 1, -1)
        key, value = torch.cat([front, key], 2), torch.cat([torch.zeros_like(value[:, :, :1]), value], 2)
        mask = None if mask is None else F.pad(mask, (1, 0))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    module.zero_mass = weights[..., 0].transpose(1, 2) if zero_key is not None else None
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, written_out)
AttentionMaskInterface.register(NAME, eager_mask)


def executions(config: ZttConfig) -> list[tuple[int, int]]:
    """(stored layer, cycle) of every execution, in order."""
    stored = list(range(config.base_config.num_hidden_layers))
    head, tail = stored[: config.head_layers], stored[len(stored) - config.tail_layers :]
    middle = stored[len(head) : len(stored) - len(tail)]
    if config.schedule == "block":
        cycled = [(layer, cycle) for cycle in range(config.cycles) for layer in middle]
    else:
        cycled = [(layer, cycle) for layer in middle for cycle in range(config.cycles)]
    return [(layer, 0) for layer in head] + cycled + [(layer, 0) for layer in tail]


def layers_of(plain: Any) -> Any:
    """The decoder layers of a plain model of any of the families."""
    inner = plain.base_model
    inner = getattr(inner, "decoder", inner)
    return inner.h if hasattr(inner, "h") else inner.layers


def attention_of(layer: Any) -> Any:
    return next(getattr(layer, name) for name in ("self_attn", "attn", "attention") if hasattr(layer, name))


def unroll(model: ZttForCausalLM, depth: Tensor | None = None) -> Any:
    """The physically unrolled model with copies of all weights; zero keys must not be rotated (`origin`).

    With `depth` a token passes unchanged through the layers beyond it.
    """
    config, order = model.config, executions(model.config)
    plain_config = copy.deepcopy(config.base_config)
    for name in ("layer_types", "no_rope_layers"):  # one entry a layer
        if getattr(plain_config, name, None) is not None:
            setattr(plain_config, name, [getattr(plain_config, name)[layer] for layer, _ in order])
    plain_config.num_hidden_layers = len(order)
    plain_config._attn_implementation = NAME
    plain = AutoModelForCausalLM.from_config(plain_config).eval()

    stored = {name.removeprefix("base."): w for name, w in model.state_dict().items() if name.startswith("base.")}
    prefix = next(name for name, child in plain.named_modules() if child is layers_of(plain)) + "."
    rest = {name: w for name, w in stored.items() if not name.startswith(prefix)}
    missing = plain.load_state_dict(rest, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(prefix) for name in missing.missing_keys)
    zero = model.state_dict().get("zero_tokens.keys")
    edge = model.state_dict().get("zero_tokens.edge_keys")
    head, stored_layers = config.head_layers, config.base_config.num_hidden_layers
    for (index, cycle), layer in zip(order, layers_of(plain), strict=True):
        own = {k.removeprefix(f"{prefix}{index}."): w for k, w in stored.items() if k.startswith(f"{prefix}{index}.")}
        layer.load_state_dict(own)
        attention = attention_of(layer)
        if getattr(plain_config, "scale_attn_by_inverse_layer_idx", False):  # by the stored layer, not by the execution
            attention.scaling = attention.scaling * (attention.layer_idx + 1) / (index + 1)
        in_cycles = head <= index < stored_layers - config.tail_layers
        row = cycle - (config.zero_token_start - 1)
        if in_cycles and zero is not None and row >= 0:
            attention.zero_key = zero[row, index - head]
        elif not in_cycles and edge is not None:
            attention.zero_key = edge[index if index < head else index - stored_layers + len(edge)]
    hook_cycles(model, layers_of(plain), depth)
    return plain


def hook_cycles(model: ZttForCausalLM, layers: Any, depth: Tensor | None) -> None:
    """Gates, mixed streams, input injection, scales and frozen tokens, around the layers of the unrolled model."""
    config, state = model.config, model.state_dict()
    first, last = config.head_layers, config.base_config.num_hidden_layers - config.tail_layers - 1
    gates, injection, scales = (
        state.get(f"{name}.weight") for name in ("cycle_gates", "input_injection", "cycle_scales")
    )
    weight, bias, scale = (state.get(f"residual_streams.{name}") for name in ("weight", "bias", "scale"))
    count = config.residual_streams
    seen: dict[str, Tensor] = {}  # the head's output, and what the cycle before was fed with
    streams: list[Tensor] = []
    for (index, cycle), layer in zip(executions(config), layers, strict=True):
        running = torch.tensor(True) if depth is None else (cycle < depth)[..., None]

        def mixed(out: Tensor, pair: int) -> Tensor:
            """What a cycle is fed with that comes after one with this output."""
            unit = out / out.norm(dim=-1, keepdim=True)
            number = bias[pair] + scale[pair].repeat_interleave(count) * (unit @ weight[pair].T).tanh()
            for j in range(count):
                keep, more = number[..., count + j, None], number[..., 2 * count + j, None]
                streams[j] = out + keep * (streams[j] - seen["fed"]) + more * (out - seen["fed"])
            return torch.stack([number[..., j, None] * streams[j] for j in range(count)]).sum(0)

        def enter(_: Any, args: Any, index: int = index, cycle: int = cycle, running: Tensor = running) -> Any:
            if index != first:
                return None
            x = args[0]
            if cycle == 0:
                seen["head"] = seen["fed"] = x
                streams[:] = [x] * count
                return None
            if weight is not None:
                x = seen["fed"] = mixed(x, cycle - 1)
            if injection is not None:
                x = x + injection[cycle - 1] * seen["head"]
            return torch.where(running, x, args[0]), *args[1:]

        def leave(
            _: Any, args: Any, out: Tensor, index: int = index, cycle: int = cycle, running: Tensor = running
        ) -> Tensor:
            if gates is not None and cycle > 0:
                out = args[0] + gates[cycle - 1, index - first] * (out - args[0])
            if scales is not None and index == last:
                out = out * scales[cycle]
            return torch.where(running, out, args[0])

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
