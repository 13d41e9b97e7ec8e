"""`kernels.cpp`, compiled once for this machine by the C++ compiler at hand, and its functions for torch's tensors.

Without a compiler, with another OpenMP than torch's, or with `ZERODRAFT_COMPILE=0` there are none, and callers do
without them. The library lies in the cache directory (`$ZERODRAFT_CACHE`) under a name made of the source, the flags,
the compiler and the processor, so that one directory serves several machines.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from zerodraft.targets.cache import default_cache_dir

logger = logging.getLogger(__name__)

PANEL = 16
"""Outputs of a panel of weights."""
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
After = Literal["", "silu", "add", "times"]
"""What `linear` can do to its products, in the order of kernels.cpp."""

_AFTER = get_args(After)
_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class LayerPointers(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = [
        (name, _Pointer)
        for name in ("qkv", "qkv_bias", "out", "out_bias", "gate", "gate_bias", "up", "up_bias", "down", "down_bias")
    ] + [(name, _Pointer) for name in ("qk_gain", "before", "after")]


class Shape(ctypes.Structure):
    """`Shape` of kernels.cpp."""

    _fields_ = [(name, _Int) for name in ("layers", "hidden", "inner", "heads", "kv_heads", "head_dim", "narrow")] + [
        (name, ctypes.c_float) for name in ("floor", "head_floor", "scale")
    ]


class Pass(ctypes.Structure):
    """`Pass` of kernels.cpp."""

    _fields_ = [
        *((name, _Int) for name in ("sequences", "tokens", "past", "capacity", "threads", "causal")),
        *((name, _Int) for name in ("masked_from", "context", "feed_step", "last_from")),
        *((name, _Pointer) for name in ("x", "turns", "kv", "scratch")),
    ]


class Kernels:
    """The compiled functions. Tensors are contiguous, float32 (weights also bfloat16), on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear, self._forward, self._scratch_floats = library.linear, library.forward, library.scratch_floats
        self._linear.argtypes = [_Pointer, _Pointer, _Int] + [_Pointer] * 3 + [_Int] * 5
        self._linear.restype = self._forward.restype = None
        self._scratch_floats.restype = library.lanes.restype = _Int
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
        out = x.new_empty(*x.shape[:-1], outputs)
        k, narrow = x.shape[-1], panels.dtype == torch.bfloat16
        self._linear(
            x.data_ptr(), panels.data_ptr(), narrow, pointer(bias), pointer(other), out.data_ptr(),
            x.numel() // k, k, outputs, _AFTER.index(after), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def forward(
        self, shape: Shape, layers: Any, run: Pass, masks: Sequence[Any], taps: Sequence[Any], feeds: Sequence[Any]
    ) -> None:
        """All layers of a pass; the last three hold a pointer or None for each layer. Scratch is found here."""
        run.threads = torch.get_num_threads()
        scratch = torch.empty(self._scratch_floats(ctypes.byref(shape), ctypes.byref(run)))
        run.scratch = scratch.data_ptr()
        many = _Pointer * len(masks)
        self._forward(ctypes.byref(shape), layers, ctypes.byref(run), many(*masks), many(*taps), many(*feeds))


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements begin."""
    return None if tensor is None else tensor.data_ptr()


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
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.info("no C++ compiler: the lean path does without compiled kernels")
        return None
    try:
        return Kernels(build(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.info("the lean path does without compiled kernels: %s", str(reason).strip().split("\n")[0])
        return None


def build(compiler: str, flags: Sequence[str] = FLAGS, folder: Path | None = None) -> ctypes.CDLL:
    """Compile, unless that was done before, and load.

    Args:
        compiler: the command.
        flags: its flags.
        folder: where libraries are kept; None: in the cache directory.

    Raises:
        OSError: no such compiler, nowhere to write, or a library that cannot be loaded.
        subprocess.SubprocessError: the compiler failed.
    """
    folder = default_cache_dir() / "kernels" if folder is None else folder
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), *flags, version, platform.machine(), _processor())
    path = folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            logger.info("compiling kernels for this machine (a few seconds, once)")
            _compile(compiler, flags, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, flags: Sequence[str], path: Path) -> None:
    """Compile to another name first. OpenMP is not linked: its functions are those that torch has loaded, so that both
    share one team of threads; two would wait for each other."""
    unit, partial = path.with_suffix(".o"), path.with_suffix(".partial")
    try:
        for words in ([*flags, "-c", str(SOURCE), "-o", str(unit)], ["-shared", str(unit), "-o", str(partial)]):
            subprocess.run([compiler, *words], capture_output=True, text=True, check=True, timeout=300)
        os.replace(partial, path)
    finally:
        unit.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return platform.processor()
    return "|".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
