"""The compiled functions of `kernels/` for torch's tensors, which are checked here: C++ reads what it is pointed to.

Without a compiler, with another OpenMP than torch's, with nowhere to keep the library (`library.py`) or with
`ZERODRAFT_COMPILE=0` there are none, and callers do without them.
"""

import ctypes
import logging
import math
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.library import build, compiler_words

logger = logging.getLogger(__name__)

PANEL = 16
"""Outputs of a panel of weights."""
After = Literal["", "silu", "add", "times"]
"""What `linear` can do to its products, in the order of kernels/product.h."""

CPU = torch.device("cpu")
"""Stated wherever something is allocated for the kernels: a caller's default device may be another."""

_AFTER = get_args(After)
_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class LayerPointers(ctypes.Structure):
    """`Layer` of kernels/structures.h."""

    _fields_ = [
        (name, _Pointer)
        for name in ("qkv", "qkv_bias", "out", "out_bias", "gate", "gate_bias", "up", "up_bias", "down", "down_bias")
    ] + [
        *((name, _Pointer) for name in ("qk_gain", "before", "after", "zero")),
        ("zero_turns", _Int),
        *((name, ctypes.c_float) for name in ("cycle_gate", "injection", "scale")),
    ]


class Shape(ctypes.Structure):
    """`Shape` of kernels/structures.h."""

    _fields_ = [
        *((name, _Int) for name in ("layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "narrow")),
        *((name, _Int) for name in ("head_layers", "gated")),
        *((name, ctypes.c_float) for name in ("floor", "head_floor", "scale")),
    ]


class Pass(ctypes.Structure):
    """`Pass` of kernels/structures.h."""

    _fields_ = [
        *((name, _Int) for name in ("first", "last", "sequences", "tokens", "past", "capacity", "threads")),
        *((name, _Int) for name in ("seen", "texts", "causal", "masked_from", "context", "feed_step", "last_from")),
        *((name, _Int) for name in ("known", "known_to")),
        *((name, _Pointer) for name in ("x", "head_output", "turns", "kv", "places", "text_of", "shifts", "scratch")),
    ]


class Exits(ctypes.Structure):
    """`Exits` of kernels/structures.h."""

    _fields_ = [
        *((name, _Int) for name in ("head", "shared", "cycles", "score", "first_read", "end_read", "latest", "noted")),
        *((name, _Pointer) for name in ("thresholds", "depth", "states")),
    ]


class Draft(ctypes.Structure):
    """`Draft` of kernels/structures.h."""

    _fields_ = [
        *((name, _Int) for name in ("first", "vocabulary", "narrow", "candidates", "eos_count")),
        ("least", ctypes.c_double),
        *((name, _Pointer) for name in ("eos", "embedding", "head", "head_bias", "head_gain")),
        *((name, _Pointer) for name in ("logits", "ids", "log_q")),
    ]


class Kernels:
    """The compiled functions. Tensors are contiguous, float32 (weights also bfloat16), on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear, self._forward, self._scratch_floats = library.linear, library.forward, library.scratch_floats
        self._with_exits, self._draft = library.forward_with_exits, library.draft
        self._linear.argtypes = [_Pointer, _Pointer, _Int] + [_Pointer] * 3 + [_Int] * 5
        self._linear.restype = self._forward.restype = self._with_exits.restype = None
        self._scratch_floats.restype = self._draft.restype = library.lanes.restype = _Int
        self.lanes: int = library.lanes()

    def linear(
        self,
        x: Float[Tensor, "*s K"],
        panels: Float[Tensor, "P K 16"],
        bias: Tensor | None,
        outputs: int,
        after: After = "",
        other: Tensor | None = None,
    ) -> Float[Tensor, "*s O"]:
        """x @ weight.T + bias, and what comes after."""
        *lead, k = x.shape
        narrow = panels.dtype == torch.bfloat16
        out = torch.empty(*lead, outputs, dtype=torch.float32, device=CPU)
        at = address(panels, (-(-outputs // PANEL), k, PANEL), torch.bfloat16 if narrow else torch.float32)
        self._linear(
            address(x, x.shape), at, narrow, bias if bias is None else address(bias, (outputs,)),
            other if other is None else address(other, out.shape), out.data_ptr(),
            math.prod(lead), k, outputs, _AFTER.index(after), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def forward(
        self,
        shape: Shape,
        layers: Any,
        run: Pass,
        masks: Sequence[Any],
        taps: Sequence[Any],
        feeds: Sequence[Any],
        masses: Sequence[Any],
    ) -> None:
        """The layers of a pass; the last four hold an address or None for each layer. Scratch is found here."""
        each = (_pointers(addresses) for addresses in (masks, taps, feeds, masses))
        self._call(self._forward, shape, layers, run, *each, exits=False)

    def forward_with_exits(
        self, shape: Shape, layers: Any, run: Pass, masks: Sequence[Any], taps: Sequence[Any], exits: Exits
    ) -> None:
        """All layers with early exit; see `forward`."""
        rest = _pointers(masks), _pointers(taps), ctypes.byref(exits)
        self._call(self._with_exits, shape, layers, run, *rest, exits=True)

    def draft(self, shape: Shape, layers: Any, run: Pass, exits: Exits, own: Draft) -> int:
        """At most as many tokens of a single text as the pass has room for, one after the other, each with early exit;
        how many."""
        nulls = _nulls(shape.layers)
        rest = nulls, nulls, ctypes.byref(exits), ctypes.byref(own)
        return self._call(self._draft, shape, layers, run, *rest, exits=True)

    def _call(self, function: Any, shape: Shape, layers: Any, run: Pass, *rest: Any, exits: bool) -> Any:
        run.threads = torch.get_num_threads()
        floats = self._scratch_floats(ctypes.byref(shape), ctypes.byref(run), exits)
        scratch = torch.empty(floats, dtype=torch.float32, device=CPU)
        run.scratch = scratch.data_ptr()
        return function(ctypes.byref(shape), layers, ctypes.byref(run), *rest)


def _pointers(addresses: Sequence[Any]) -> Any:
    return (_Pointer * len(addresses))(*addresses) if any(addresses) else _nulls(len(addresses))


@cache
def _nulls(count: int) -> Any:
    return (_Pointer * count)()


def address(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Where a tensor's elements begin, if they lie as the kernels read them.

    Raises:
        ZerodraftError: another shape, dtype or device, or elements that do not follow each other.
    """
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        state = "contiguous" if tensor.is_contiguous() else "strided"
        raise ZerodraftError(
            f"The compiled kernels read a contiguous {dtype} tensor of shape {tuple(shape)} on the CPU, not a {state} "
            f"{tensor.dtype} one of shape {tuple(tensor.shape)} on {tensor.device}."
        )
    return tensor.data_ptr()


def to_panels(weight: Float[Tensor, "O K"], gain: Float[Tensor, "K"] | None = None) -> Float[Tensor, "P K 16"]:
    """A weight in panels of 16 outputs, the last one filled up with zeros, its inputs multiplied by `gain`. No more
    memory than that is used on the way."""
    outputs, inputs = weight.shape
    whole, rest = divmod(outputs, PANEL)
    panels = weight.new_empty(whole + (rest > 0), inputs, PANEL)
    panels[:whole] = weight[: whole * PANEL].unflatten(0, (whole, PANEL)).transpose(1, 2)
    if rest:
        panels[whole, :, :rest] = weight[whole * PANEL :].T
        panels[whole, :, rest:] = 0
    return panels if gain is None else panels.mul_(gain[:, None])


@cache
def kernels() -> Kernels | None:
    """The functions, compiled if they are not there yet (a few seconds); None where there can be none."""
    if os.environ.get("ZERODRAFT_COMPILE", "1") == "0":
        return None
    try:
        compiler = compiler_words()
        if not compiler:
            logger.info("no C++ compiler: the lean path does without compiled kernels")
            return None
        return Kernels(build(compiler))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("decoding does without compiled kernels, at about half the speed: %s", _first_line(error))
        return None


def _first_line(error: Exception) -> str:
    """What went wrong; of a compiler's complaints the first that it calls an error."""
    lines = str(getattr(error, "stderr", None) or error).strip().split("\n")
    return next((line for line in lines if "error" in line), lines[0]).strip()
