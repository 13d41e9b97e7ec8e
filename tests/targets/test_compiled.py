"""The kernels are compiled once, under a lock, for this machine, and there are none without a compiler.

That they compute what they should is tested where they are used (packed linear layers, the lean path); here for other
processors than the one at hand.
"""

import logging
import multiprocessing
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.ztt.tiny import gap, tiny_plain, tokens
from zerodraft.targets import compiled
from zerodraft.targets.compiled import FLAGS, Kernels, build, kernels, to_panels
from zerodraft.targets.lean import lean_target
from zerodraft.targets.lean_weights import lean_weights

COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
OLD = tuple(flag for flag in FLAGS if flag != "-march=native")
PROCESSORS = {"this one": FLAGS}
if platform.machine().lower() in ("x86_64", "amd64"):
    PROCESSORS |= {"avx2": (*OLD, "-mavx2", "-mfma"), "sse2": (*OLD, "-msse2")}


@needs_compiler
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 30])
@pytest.mark.parametrize("outputs", [16, 40, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_for_other_processors(
    processor: str, rows: int, outputs: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    functions = library(PROCESSORS[processor], tmp_path_factory)
    x, weight, bias = torch.randn(rows, 23), torch.randn(outputs, 23).to(dtype).float(), torch.randn(outputs)
    other = torch.randn(rows, outputs)
    panels = to_panels(weight).to(dtype)
    product = F.linear(x, weight, bias)
    for found, wanted in (
        (functions.linear(x, panels, None, outputs), F.linear(x, weight)),
        (functions.linear(x, panels, bias, outputs, "silu"), F.silu(product)),
        (functions.linear(x, panels, bias, outputs, "add", other), product + other),
        (functions.linear(x, panels, bias, outputs, "times", other), product * other),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_layers_for_other_processors(
    processor: str, family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = library(PROCESSORS[processor], tmp_path_factory)
    monkeypatch.setattr("zerodraft.targets.packed.kernels", lambda: functions)
    monkeypatch.setattr("zerodraft.targets.lean_compiled.kernels", lambda: functions)
    model, prompt = tiny_plain(family, head_dim=32), tokens(1, 30)
    target, weights = lean_target(model), lean_weights(model)
    assert target is not None
    assert weights is not None
    assert weights.compiled is not None
    found = target.prefill(prompt, prompt >= 0, ()).logits[0, -1]
    with torch.no_grad():
        assert gap(found, model(prompt).logits[0, -1]) < 2e-5


_built: dict[tuple[str, ...], Kernels] = {}


def library(flags: tuple[str, ...], folders: pytest.TempPathFactory) -> Kernels:
    """Compiled once for all tests."""
    assert COMPILER is not None
    if flags not in _built:
        _built[flags] = Kernels(build(COMPILER, flags, folders.mktemp("kernels")))
    return _built[flags]


@needs_compiler
def test_numbers_that_are_not_finite_stay_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    functions = library(FLAGS, tmp_path_factory)
    x, weight = torch.randn(2, 8), torch.eye(16, 8)
    x[0, 3], x[1, 2] = float("nan"), float("inf")
    found = functions.linear(x, to_panels(weight), None, 16, "silu")
    assert found[0, 3].isnan()
    assert not found[1].isfinite().all()


@needs_compiler
def test_compiled_once_and_nothing_else_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert COMPILER is not None
    with caplog.at_level(logging.INFO, logger="zerodraft"):
        build(COMPILER, FLAGS, tmp_path)
        build(COMPILER, FLAGS, tmp_path)
    assert [record.message for record in caplog.records] == ["compiling kernels for this machine (a few seconds, once)"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) in ([".so"], [".lock", ".so"])


@needs_compiler
def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_build_there, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(280)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("*.so"))) == 1


def _build_there(folder: Path) -> None:
    assert COMPILER is not None
    build(COMPILER, FLAGS, folder)


@needs_compiler
def test_what_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    assert COMPILER is not None
    with pytest.raises(subprocess.CalledProcessError):
        build(COMPILER, (*FLAGS, "-include", "no-such-file.h"), tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("why", ["switched off", "no compiler", "broken compiler"])
def test_without_kernels(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "switched off":
        monkeypatch.setenv("ZERODRAFT_COMPILE", "0")
    elif why == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.__wrapped__() is None
