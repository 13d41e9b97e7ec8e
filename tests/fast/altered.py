"""Models with something in them that a fast target would pass by."""

from typing import Any

from torch import nn


def with_hook(model: Any) -> Any:
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 2)
    return model


def with_other_forward(model: Any) -> Any:
    model.model.layers[0].forward = model.model.layers[0].forward
    return model


class Adapted(nn.Linear):
    """Stands for any layer that is a linear one and more."""


def with_adapter(model: Any) -> Any:
    model.model.layers[0].self_attn.q_proj = Adapted(32, 32, bias=False)
    return model
