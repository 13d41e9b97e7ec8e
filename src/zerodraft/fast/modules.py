"""What targets that do not run a model's own Python ask of its modules: that there is nothing to run in it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

# transformers hooks every layer the first time that hidden states are asked for; the hooks only look
_HARMLESS_HOOKS = "transformers.utils.output_capturing"

VARYING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary positions that compute their frequencies anew as the text grows."""


def is_untouched(module: nn.Module, known_hooks: Iterable[str] = ()) -> bool:
    """Whether a module has its class's forward, and no hooks but those that do nothing or come from `known_hooks`
    (Python modules)."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    origins = {getattr(hook, "__module__", "") for hook in hooks}
    return "forward" not in vars(module) and origins <= {_HARMLESS_HOOKS, *known_hooks}


def settings_of(model: Any) -> tuple[Any, ...]:
    """Every number and word that the modules hold beside tensors, and the configuration: what a recorded pass has
    taken in once and for all."""
    plain = (bool, int, float, str)
    held = (item for module in model.modules() for item in vars(module).items() if type(item[1]) in plain)
    return (str(model.config.to_dict()), *held)


def has_plain_parameters(model: nn.Module) -> bool:
    """Whether all parameters are ordinary ones, not quantised, parametrised or spread over devices."""
    return all(type(p) is nn.Parameter and type(p.data) is Tensor for p in model.parameters())
