"""A CUDA graph's stand-in on a CPU: the operations of one run, replayed on the same tensors, Python left out.

What a graph cannot hold is refused, as capture would: numbers that Python asks for, shapes that depend on numbers,
tensors that Python makes from its own numbers (a copy from the host, and frozen ever after).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

REFUSED = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "lift_fresh",
    "pin_memory",
)


class Tape(TorchDispatchMode):
    """Notes every operation with the very tensors that it had and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        assert name not in REFUSED, f"{func} cannot be captured"
        assert not mask, f"{func} with a boolean index cannot be captured"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Taped:
    """A recorder (see `recorded.Recorder`) like `CudaGraphs`, for any device."""

    made = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Any) -> Any:
        for _ in range(2):
            run()
        with Tape() as tape:
            results = run()
        Taped.made += 1

        def replay() -> Any:
            now: dict[int, Tensor] = {}

            def current(x: Any) -> Any:
                return now.get(id(x), x) if isinstance(x, Tensor) else x

            def note(before: Any, after: Any) -> None:
                if isinstance(before, Tensor):
                    now[id(before)] = after
                elif isinstance(before, list | tuple):
                    for one, other in zip(before, after, strict=True):
                        note(one, other)

            for func, args, kwargs, result in tape.calls:
                note(result, func(*tree_map(current, args), **tree_map(current, kwargs)))
            # a graph's results are where they were
            for before in results or ():
                if before is not None:
                    before.copy_(now[id(before)])
            return results

        return replay
