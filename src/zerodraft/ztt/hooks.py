"""Forward hooks that stay where they mean something while adapters come and go.

PEFT puts a wrapper in a projection's place, and merging takes it away again. What is added to the projection's output,
or scales it, must see the output of the whole: on the wrapped module alone, merging would change the logits.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class SlotHook:
    """A forward hook on whatever module stands at a name.

    Args:
        root: Where the name is looked up.
        name: Dotted name of the module that is hooked.
        hook: As `nn.Module.register_forward_hook` takes it.
    """

    def __init__(self, root: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        parent, _, self.leaf = name.rpartition(".")
        self.parent, self.hook = root.get_submodule(parent), hook
        self.module: nn.Module | None = None
        self.handle: RemovableHandle | None = None
        self.follow()

    def follow(self) -> None:
        """Hook the module that stands there now; nearly always it is the one that is hooked."""
        module = getattr(self.parent, self.leaf)
        if module is not self.module:
            if self.handle is not None:
                self.handle.remove()
            self.module, self.handle = module, module.register_forward_hook(self.hook)
