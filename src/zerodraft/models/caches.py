"""What transformers calls a key-value cache: the only place in the package that knows a name for it.

Up to 5.23 it is `past_key_values`, from 5.24 on `cache`, and the decoder layers of some families say `layer_past` in
both. So the name is read off what the code at hand declares: the argument or field that is annotated as a `Cache`, or,
where there are no annotations, one with a name that was seen before.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import transformers
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from zerodraft.common.errors import ZerodraftError

KNOWN = ("cache", "past_key_values", "layer_past")


def declared(annotations: Iterable[tuple[str, Any]]) -> str | None:
    """Of names with their annotations the one that stands for the cache, or None."""
    by_name = dict(annotations)
    typed = (name for name, annotation in by_name.items() if re.search(r"\bCache\b", str(annotation)))
    return next(typed, None) or next((name for name in KNOWN if name in by_name), None)


def cache_argument(function: Callable[..., Any]) -> str | None:
    """The name of a function's cache argument, or None if it has none."""
    return declared((name, p.annotation) for name, p in inspect.signature(function).parameters.items())


def of_library(name: str | None, place: str) -> str:
    """A name that this release of transformers must have.

    Raises:
        ZerodraftError: it has none.
    """
    if name is None:
        raise ZerodraftError(
            f"transformers {transformers.__version__} has no cache in {place}, neither by type nor as "
            f"{', '.join(KNOWN)}; install a release that zerodraft was tested with, as its pyproject.toml says."
        )
    return name


_prepare = GenerationMixin.prepare_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]  # self: a protocol
CACHE = of_library(cache_argument(_prepare), "the inputs of `generate`")
"""What `generate` and the forward passes of models take the cache as."""

RETURNED = of_library(
    declared((field.name, field.type) for field in fields(BaseModelOutputWithPast)), "the outputs of models"
)
"""What the outputs of models and of `generate` hold it as."""


def argument_of(model: Any) -> str:
    """What the forward pass of a model takes the cache as; if it only hands on its arguments: the library's name."""
    return cache_argument(model.forward) or CACHE


def returned_by(output: Any) -> Cache | None:
    """The cache in an output of a model or of `generate`."""
    return getattr(output, RETURNED)


def for_return(cache: Cache | None) -> dict[str, Any]:
    """The argument with which an output of a model or of `generate` is made to hold a cache."""
    return {RETURNED: cache}


def the_one(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache that was given under either name; our own functions take both, whatever the release.

    Raises:
        ZerodraftError: two caches.
    """
    if past_key_values is not None and cache is not None:
        raise ZerodraftError("cache and past_key_values are two names of the same argument; give one of them.")
    return past_key_values if cache is None else cache


def check_takes_cache(model: Any) -> None:
    """Raise `ZerodraftError` for a model in training whose layers are checkpointed: transformers' layers are then given
    no cache, and would see of a text what one pass holds."""
    dropped = (layer.training and getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    if any(dropped):
        raise ZerodraftError(
            f"{type(model).__name__} is in training with gradient checkpointing, in which transformers hands layers no "
            "cache: call model.eval() before it writes, and model.train() after it."
        )
