"""Modules that have moved, under the names that they had up to version 0.1: importing one warns and gives the module of
today. `zerodraft.targets`, which is no more, is made anew with what it exported."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGETS = "zerodraft.targets"

_FROM: dict[str, dict[str, Sequence[str]]] = {
    "": {"common": ("errors", "files", "lock", "outputs"), "models": ("caches",)},
    "targets": {
        "models": ("cache", "foreign", "resolve", "wheel"),
        "fast": (
            "best", "check", "compiled", "graphed", "int8", "lean", "library", "modules", "packed",
            "recorded",
        ),
    },
    "ztt": {"models": ("loading",)},
    "decoding": {"fast": ("cache", "target"), "generate": ("door", "feeding", "huggingface")},
    "training": {
        "training.ztt": ("adapters", "losses", "models", "run", "trainer"),
        "training.drafters": (
            "acceptance", "acceptance_plot", "autoregressive", "autoregressive_recipe", "blocks", "completions",
            "dflash", "distill", "features", "masked", "masked_recipe", "walk", "writer",
        ),
    },
}  # fmt: skip

MOVED = {
    ".".join(filter(None, ("zerodraft", old, name))): f"zerodraft.{new}.{name}"
    for old, rooms in _FROM.items()
    for new, names in rooms.items()
    for name in names
} | {
    "zerodraft.targets.lean_compiled": "zerodraft.fast.lean.compiled_layers",
    "zerodraft.targets.lean_weights": "zerodraft.fast.lean.weights",
    "zerodraft.targets.lean_ztt": "zerodraft.fast.lean.ztt",
    "zerodraft.training.drafter": "zerodraft.training.drafters.block",
    "zerodraft.training.drafter_recipe": "zerodraft.training.drafters.recipe",
    "zerodraft.training.drafter_run": "zerodraft.training.drafters.run",
}


class Moved(MetaPathFinder, Loader):
    """Finds the old names."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        known = fullname in MOVED or fullname == TARGETS
        return ModuleSpec(fullname, self, is_package=fullname == TARGETS) if known else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == TARGETS:
            warnings.warn(
                f"{name} is no more: zerodraft.models and zerodraft.fast have its parts", DeprecationWarning, 2
            )
            module.resolve = import_module("zerodraft.models.resolve").resolve  # pyright: ignore[reportAttributeAccessIssue]  # new here
            return
        warnings.warn(f"{name} is now {MOVED[name]}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = import_module(MOVED[name])


def install() -> None:
    """Have the old names found, after all others."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())
