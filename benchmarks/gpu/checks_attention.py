"""Whether attention with a zero token is right on a GPU: its forms against float64 on the CPU, with gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from report import Report
from torch import Tensor

from zerodraft.ztt.attention import (
    has_lse_kernel,
    zero_attention_flex,
    zero_attention_lse,
    zero_attention_reference,
    zero_attention_sdpa,
    zero_scores,
)

SCALE = 0.3
HALVES = (torch.bfloat16, torch.float16)


def attention_cases(small: bool) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor | None, bool]]:
    """Name, (q, k, v, zero key) in float64 on the CPU with 3 query heads for each of 2 keys, mask, and `is_causal`."""
    draw = torch.Generator().manual_seed(0)
    sizes = [(1, 12, 16), (9, 0, 16)] if small else [(1, 300, 64), (130, 0, 64), (257, 0, 128), (5, 40, 64), (9, 3, 8)]
    for t, past, d in sizes:
        s = t + past
        drawn = [
            torch.randn(2, heads, n, d, generator=draw, dtype=torch.float64) for heads, n in ((6, t), (2, s), (2, s))
        ]
        key = 2 * torch.randn(2, d, generator=draw, dtype=torch.float64)
        seen = torch.ones(t, s, dtype=torch.bool).tril(past).expand(2, 1, t, s).clone()
        blocked = seen.clone()
        blocked[0, :, : t // 2] = False
        name = f"{t} queries, {s} keys of {d}"
        yield f"{name}, no mask", (*drawn, key), None, False
        yield f"{name}, masked", (*drawn, key), seen, False
        yield f"{name}, blocked rows", (*drawn, key), blocked, False
        if not past:
            yield f"{name}, causal", (*drawn, key), None, True


def errors_of(
    form: Callable[..., Any], inputs: tuple[Tensor, ...], mask: Tensor | None, causal: bool, grad: bool
) -> tuple[float, float]:
    """Largest relative errors of results and of gradients against the reference in float64 on the same numbers."""
    weights, found = None, []
    for exact in (True, False):
        q, k, v, key = (x.detach().to("cpu", torch.float64) if exact else x.detach() for x in inputs)
        leaves = [x.requires_grad_(grad) for x in (q, k, v, key)]
        at = None if mask is None else mask.to(q.device)
        if exact:
            s0 = zero_scores(q, key, SCALE)
            results = zero_attention_reference(q, k, v, s0, mask=at, is_causal=causal, scale=SCALE)
        else:
            results = form(q, k, v, key, mask=at, is_causal=causal)
        if weights is None:
            draw = torch.Generator().manual_seed(9)
            weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in results]
        grads: tuple[Tensor, ...] = ()
        if grad:
            total: Any = sum((x * w.to(x)).sum() for x, w in zip(results, weights, strict=True))
            grads = torch.autograd.grad(total, leaves)
        found.append([[x.detach().to("cpu", torch.float64) for x in of] for of in (results, grads)])
    (right, right_grads), (ours, our_grads) = found
    return _worst(ours, right), _worst(our_grads, right_grads)


def _worst(ours: list[Tensor], right: list[Tensor]) -> float:
    pairs = list(zip(ours, right, strict=True))
    assert all(bool(a.isfinite().all()) for a, _ in pairs), "not finite"
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs), default=0.0)


def _tolerances(dtype: torch.dtype) -> tuple[float, float]:
    unit = torch.finfo(dtype).eps
    return (4 * unit, 16 * unit) if dtype in HALVES else (1e-5, 1e-4)


def check_form(report: Report, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """All cases that a form takes."""

    def sdpa(*x: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
        return zero_attention_sdpa(*x, mask=mask, is_causal=is_causal, scale=SCALE)

    def lse(*x: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
        return zero_attention_lse(*x, mask=mask, is_causal=is_causal, scale=SCALE)

    forward, backward, taken = {}, {}, 0
    for name, exact, mask, causal in attention_cases(report.small):
        inputs = tuple(x.to(report.device, dtype) for x in exact)
        grad = form == "sdpa"
        if form == "lse" and not has_lse_kernel(inputs[0], inputs[1], mask, causal, 0.0, grad):
            continue
        forward[name], backward[name] = errors_of({"sdpa": sdpa, "lse": lse}[form], inputs, mask, causal, grad)
        taken += 1
    found = {
        "cases": taken,
        "forward": max(forward.values(), default=None),
        "backward": max(backward.values(), default=None),
    }
    most = _tolerances(dtype)
    beyond = [name for name in forward if forward[name] > most[0] or backward[name] > most[1]]
    assert not beyond, f"{found}, beyond {most}: {[(name, forward[name], backward[name]) for name in beyond]}"
    return found


def attention(report: Report) -> None:
    """The fused forms against float64. `step` is for CPUs alone; `flex` has a part of its own, as it compiles."""
    for dtype in (torch.float32, *HALVES):
        for form in ("sdpa", "lse"):
            name = f"{form}, {str(dtype).removeprefix('torch.')}"
            report.step(name, lambda form=form, dtype=dtype: check_form(report, form, dtype))


def flex(report: Report) -> None:
    """The form on `flex_attention`: compiled on a GPU, with its gradients."""
    from torch.nn.attention.flex_attention import create_block_mask

    def form(*x: Tensor, mask: Tensor | None, is_causal: bool) -> Any:
        q, k, v, key = x
        made = None
        if mask is not None:
            shape = (len(q), None, q.shape[2], k.shape[2])
            made = create_block_mask(lambda b, h, i, j: mask[b, 0, i, j], *shape, device=str(q.device))
        return zero_attention_flex(q, k, v, zero_scores(q, key, SCALE), block_mask=made, scale=SCALE)

    def check(dtype: torch.dtype, exact: tuple[Tensor, ...], mask: Tensor | None) -> dict[str, float]:
        inputs = tuple(x.to(report.device, dtype) for x in exact)
        # without a GPU it has no gradients
        grad, most = report.device.type == "cuda" and inputs[0].shape[2] > 1, _tolerances(dtype)
        forward, backward = errors_of(form, inputs, mask, False, grad)
        assert forward <= most[0], f"{forward} forward, {backward} backward, beyond {most}"
        assert backward <= most[1], f"{forward} forward, {backward} backward, beyond {most}"
        return {"forward": forward, "backward": backward}

    for dtype in (torch.bfloat16,) if report.small else (torch.bfloat16, torch.float32):
        # after eight compilations of a function dynamo runs it uncompiled
        torch._dynamo.reset()
        for name, exact, mask, causal in attention_cases(report.small):
            if not causal and "blocked" not in name and exact[0].shape[-1] >= 16:
                title = f"{name}, {str(dtype).removeprefix('torch.')}"
                report.step(title, lambda d=dtype, x=exact, m=mask: check(d, x, m))
