"""Whether attention with a zero token is right on a GPU: its forms against the tests' oracle, in float64 on the CPU."""

from collections.abc import Iterator
from typing import Any

import torch
from report import Report

from tests.ztt import attending
from tests.ztt.attending import Form, case, lse, sdpa, worst
from zerodraft.ztt.attention import has_lse_kernel

HALVES = (torch.bfloat16, torch.float16)
MASKS = {"no mask": "none", "masked": "bool", "blocked rows": "blocked", "causal": "causal"}


def shapes(small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Attentions by their names, as `case` takes them, with 3 query heads for each of 2 keys."""
    sizes = [(1, 12, 16), (9, 0, 16)] if small else [(1, 300, 64), (130, 0, 64), (257, 0, 128), (5, 40, 64), (9, 3, 8)]
    for t, past, d in sizes:
        for name, mask in MASKS.items():
            if mask != "causal" or not past:
                shape = {"groups": 3, "t": t, "past": past, "d": d, "mask": mask}
                yield f"{t} queries, {t + past} keys of {d}, {name}", shape


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """How far results and gradients may be off."""
    unit = torch.finfo(dtype).eps
    return (4 * unit, 16 * unit) if dtype in HALVES else (1e-5, 1e-4)


def check_form(report: Report, form: Form, dtype: torch.dtype) -> dict[str, Any]:
    """All cases that a form takes; gradients where it has them."""
    errors, most = {}, tolerances(dtype)
    for name, shape in shapes(report.small):
        x = case(**shape, grad=form is sdpa, dtype=dtype, device=report.device)
        if form is sdpa or has_lse_kernel(x.q, x.k, x.mask, x.is_causal, 0.0, False):
            errors[name] = worst(form, x)
    assert errors or report.small, "the form has no kernel for any of the cases: nothing was checked"
    beyond = {name: each for name, each in errors.items() if each[0] > most[0] or each[1] > most[1]}
    assert not beyond, beyond
    forward, backward = (max((each[i] for each in errors.values()), default=None) for i in (0, 1))
    return {"cases": len(errors), "forward": forward, "backward": backward}


def attention(report: Report) -> None:
    """The fused forms. `step` is for CPUs alone; `flex` has a part of its own, as it compiles."""
    for dtype in (torch.float32, *HALVES):
        # on CUDA the other form has kernels for 16 bits alone
        forms = (sdpa,) if dtype == torch.float32 and report.device.type == "cuda" else (sdpa, lse)
        for form in forms:
            name = f"{form.__name__}, {str(dtype).removeprefix('torch.')}"
            report.step(name, lambda form=form, dtype=dtype: check_form(report, form, dtype))


def flex(report: Report) -> None:
    """The form on `flex_attention`: compiled on a GPU, with its gradients."""

    def check(shape: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
        # without a GPU it has no gradients
        grad, most = report.device.type == "cuda" and shape["t"] > 1, tolerances(dtype)
        forward, backward = worst(attending.flex, case(**shape, grad=grad, dtype=dtype, device=report.device))
        found = {"forward": forward, "backward": backward}
        assert forward <= most[0], found
        assert backward <= most[1], found
        return found

    for dtype in (torch.bfloat16,) if report.small else (torch.bfloat16, torch.float32):
        # after eight compilations of a function dynamo runs it uncompiled
        torch._dynamo.reset()
        for name, shape in shapes(report.small):
            if shape["mask"] in ("none", "bool") and shape["d"] >= 16:
                title = f"{name}, {str(dtype).removeprefix('torch.')}"
                report.step(title, lambda shape=shape, dtype=dtype: check(shape, dtype))
