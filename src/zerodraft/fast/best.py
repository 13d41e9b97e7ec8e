"""The fastest exact way to run a model on its machine: what `DiffuSpec` takes unless it is told otherwise."""

import logging
from typing import Any
from weakref import WeakSet

from torch import nn

from zerodraft.decoding.protocols import Target
from zerodraft.fast.graphed import graphed_target, release_graphs
from zerodraft.fast.lean import lean_target
from zerodraft.fast.lean.recognise import halves_of
from zerodraft.fast.lean.weights import release_lean

logger = logging.getLogger(__name__)

_told: "WeakSet[nn.Module]" = WeakSet()
"""Models that the caller was told about."""


def best_target(model: Any) -> Target | None:
    """A fresh target that is made for the model and its machine (packed weights on a CPU, CUDA graphs), or None where
    the model's own forward pass is all there is."""
    target = lean_target(model) or graphed_target(model)
    if target is None and model not in _told and (dtype := halves_of(model)) is not None:
        _told.add(model)
        stored = str(dtype).removeprefix("torch.")
        logger.warning(
            "%s computes in %s, which takes several times as long on this CPU as float32 does here: load it with "
            "dtype=torch.float32, which changes no weight",
            type(model).__name__,
            stored,
        )
    return target


def warm_up(model: Any) -> None:
    """Pack weights and compile kernels now, so that the first text does not wait for them."""
    best_target(model)


def release(model: Any) -> None:
    """Give back the memory that decoding keeps beside a model from call to call: packed weights, recorded passes.

    The next call makes them anew. Call it too after an edit of a few rows of weights through `.data`, which is not
    noticed; what changes a matrix as a whole is.
    """
    release_lean(model)
    release_graphs(model)
