"""Counting the floating-point operations that a piece of code really executes, with torch's own counter.

torch counts matrix products and most fused attention kernels, but not the CPU's; here it does, by torch's formula for
the other kernels (all query-key pairs, whether masked or not). A product counts two operations per multiply-add.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_flash_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Shapes `(b, h, t, d)`; with fewer KV heads than query heads each of them serves a group."""
    key, value = ([*shape[:1], query[1], *shape[2:]] for shape in (key, value))
    return sdpa_flop_count(query, key, value)


class FlopCount:
    """Result of `count_flops`; `total` is known when its context has ended."""

    total: int = 0


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Counts what is executed within the context: `with count_flops() as flops: model(x)`, then `flops.total`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result = FlopCount()
    with FlopCounterMode(display=False, custom_mapping={kernel: _cpu_flash_flops}) as counter:
        yield result
    result.total = counter.get_total_flops()
