"""The fastest exact way to run a model on its machine: what `DiffuSpec` takes unless it is told otherwise."""

from typing import Any

from zerodraft.decoding.protocols import Target
from zerodraft.targets.graphed import graphed_target, release_graphs
from zerodraft.targets.lean import lean_target
from zerodraft.targets.lean_weights import release_lean


def best_target(model: Any) -> Target | None:
    """A fresh target that is made for the model and its machine (packed weights on a CPU, CUDA graphs), or None where
    the model's own forward pass is all there is."""
    return lean_target(model) or graphed_target(model)


def release(model: Any) -> None:
    """Give back the memory that decoding keeps beside a model from call to call: packed weights, recorded passes.

    The next call makes them anew. Call it too after an edit of weights through `.data`, which nobody can notice.
    """
    release_lean(model)
    release_graphs(model)
