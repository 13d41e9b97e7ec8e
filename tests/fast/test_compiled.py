"""The kernels compute what they should for other processors than the one at hand too, and over all of the floats.

Elsewhere they are tested where they are used (packed linear layers, the lean path).
"""

import platform
import shutil
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ztt.tiny import gap, tiny_plain, tokens
from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.compiled import After, Kernels, to_panels
from zerodraft.fast.lean import lean_target
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.library import FLAGS, build

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
    monkeypatch.setattr("zerodraft.fast.packed.kernels", lambda: functions)
    monkeypatch.setattr("zerodraft.fast.lean.compiled_layers.kernels", lambda: functions)
    model, prompt = tiny_plain(family, head_dim=32), tokens(1, 30)
    target = lean_target(model)
    assert target is not None
    assert isinstance(target._weights.run, CompiledLayers)
    found = target.prefill(prompt, prompt >= 0, ()).logits[0, -1]
    with torch.no_grad():
        assert gap(found, model(prompt).logits[0, -1]) < 2e-5


_built: dict[tuple[str, ...], Kernels] = {}


def library(flags: tuple[str, ...], folders: pytest.TempPathFactory) -> Kernels:
    """Compiled once for all tests."""
    assert COMPILER is not None
    if flags not in _built:
        _built[flags] = Kernels(build([COMPILER], flags, folders.mktemp("kernels")))
    return _built[flags]


def all_kinds_of_floats() -> Tensor:
    """Every float whose lower half is zero, among them both zeros, infinities, NaN of all kinds and denormal numbers;
    their neighbours; and those around which the exponential function begins and ends to be a number."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    patterns = torch.cat([upper, upper + 1, upper - 1])
    ends = torch.cat([sign * torch.linspace(80, 110, 30001) for sign in (1.0, -1.0)])
    return torch.cat([patterns.view(torch.float32), ends])


@needs_compiler
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("outputs", [16, 15])
def test_silu_of_all_kinds_of_floats(processor: str, outputs: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A vector at a time (16 outputs), and one number at a time."""
    functions, x = library(PROCESSORS[processor], tmp_path_factory), all_kinds_of_floats()
    found = functions.linear(x[:, None], to_panels(torch.ones(outputs, 1)), None, outputs, "silu")
    wanted = F.silu(x.double()).float()
    # e to the power of more than what a float holds is infinite, for torch too
    wanted = torch.where(x < -88.7228, F.silu(x), wanted)
    assert found.isnan().equal(wanted.isnan()[:, None].expand_as(found))
    torch.testing.assert_close(found, wanted[:, None].expand_as(found), rtol=1e-6, atol=1e-37, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("after", ["", "add", "times"])
def test_products_of_all_kinds_of_floats(after: After, tmp_path_factory: pytest.TempPathFactory) -> None:
    functions, x = library(FLAGS, tmp_path_factory), all_kinds_of_floats()[::7].contiguous()[:, None]
    other = x.flip(0).contiguous().expand(-1, 16).contiguous()
    found = functions.linear(x, to_panels(torch.full((16, 1), -0.5)), None, 16, after, other if after else None)
    product = (x * -0.5).expand(-1, 16)
    wanted = {"": product, "add": product + other, "times": product * other}[after]
    # 0 and -0 are equal
    assert torch.equal(found.nan_to_num(123.0, torch.inf, -torch.inf), wanted.nan_to_num(123.0, torch.inf, -torch.inf))


@needs_compiler
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 30.0, 1e3, 1e6])
def test_layers_of_scaled_weights(
    processor: str, scale: float, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax over scores that lie far from each other, gates far from zero, norms of small and large states."""
    functions = library(PROCESSORS[processor], tmp_path_factory)
    monkeypatch.setattr("zerodraft.fast.packed.kernels", lambda: functions)
    monkeypatch.setattr("zerodraft.fast.lean.compiled_layers.kernels", lambda: functions)
    model, prompt = tiny_plain("llama", head_dim=16), tokens(2, 20)
    # what the scaled part gives must not depend on rounding alone: one part, the first layer
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for part in (attention.q_proj, mlp.gate_proj, model.model.embed_tokens):
        with torch.no_grad():
            before = part.weight.clone()
            part.weight.mul_(scale)
            wanted = model(prompt).logits[:, -1]
        target = lean_target(model)
        assert target is not None
        found = target.prefill(prompt, prompt >= 0, ()).logits[:, 0]
        assert gap(found, wanted) < 1e-4 * float(wanted.abs().max())
        with torch.no_grad():
            part.weight.copy_(before)


@needs_compiler
def test_tensors_that_kernels_cannot_read_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    functions, x = library(FLAGS, tmp_path_factory), torch.randn(3, 8)
    panels = to_panels(torch.randn(20, 8))
    fits: dict[str, Any] = {"x": x, "panels": panels, "bias": torch.randn(20), "outputs": 20, "after": "add"}
    fits["other"] = torch.randn(3, 20)
    functions.linear(**fits)
    for name, wrong in (
        ("x", x.double()),
        ("x", x.bfloat16()),
        ("x", torch.randn(8, 3).T),
        ("x", x.to("meta")),
        ("x", torch.randn(3, 9)),
        ("panels", panels.half()),
        ("panels", panels[:1]),
        ("panels", panels[:, :7]),
        ("bias", torch.randn(16)),
        ("bias", torch.randn(20).double()),
        ("outputs", 33),
        ("outputs", 16),
        ("other", torch.randn(3, 1).expand(3, 20)),
        ("other", torch.randn(2, 20)),
    ):
        # jaxtyping's check of shapes under tests, or ours
        with pytest.raises((ZerodraftError, jaxtyping.TypeCheckError)):
            functions.linear(**{**fits, name: wrong})


@needs_compiler
def test_numbers_that_are_not_finite_stay_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    functions = library(FLAGS, tmp_path_factory)
    x, weight = torch.randn(2, 8), torch.eye(16, 8)
    x[0, 3], x[1, 2] = float("nan"), float("inf")
    found = functions.linear(x, to_panels(weight), None, 16, "silu")
    assert found[0, 3].isnan()
    assert not found[1].isfinite().all()
