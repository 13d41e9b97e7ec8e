"""Random attentions with a zero token, every form of it, and how far one is from the oracle."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from zerodraft.ztt.attention import (
    zero_attention_flex,
    zero_attention_lse,
    zero_attention_reference,
    zero_attention_sdpa,
    zero_scores,
)

SCALE = 0.3
CPU = torch.device("cpu")
Form = Callable[["Case"], tuple[Tensor, Tensor]]
WINDOW = 3


@dataclass(frozen=True)
class Case:
    """Inputs of one attention: q `(b, h, t, d)`, k and v `(b, kv, s, d)`, zero key `(kv, d)` or one for each query."""

    q: Tensor
    k: Tensor
    v: Tensor
    zero_key: Tensor
    mask: Tensor | None = None
    is_causal: bool = False

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.zero_key

    @property
    def exact(self) -> "Case":
        """The same case in float64 on the CPU, with fresh leaves."""
        q, k, v, zero_key = (x.detach().to(CPU, torch.float64).requires_grad_(x.requires_grad) for x in self.inputs)
        mask = self.mask
        if mask is not None:
            mask = mask.to(CPU, torch.bool if mask.dtype == torch.bool else torch.float64)
        return replace(self, q=q, k=k, v=v, zero_key=zero_key, mask=mask)


def case(
    b: int = 2,
    kv: int = 2,
    groups: int = 2,
    t: int = 6,
    past: int = 0,
    d: int = 8,
    mask: str = "causal",
    per_query: bool = False,
    grad: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Case:
    """A random case, the same on every device. Masks: causal (a flag if square), bool, or additive with -inf or the
    least number; `window` and `blocked` are bool, with a sliding window and with nothing to see for the first half of
    the queries of the first row."""
    draw = torch.Generator().manual_seed(seed)
    s = t + past
    q = torch.randn(b, kv * groups, t, d, generator=draw)
    k, v = torch.randn(2, b, kv, s, d, generator=draw)
    zero_key = 2 * torch.randn(*((b, kv, t, d) if per_query else (kv, d)), generator=draw)
    seen = torch.ones(t, s, dtype=torch.bool).tril(past).expand(b, 1, t, s).clone()
    if mask == "window":
        seen &= ~torch.ones(t, s, dtype=torch.bool).tril(past - WINDOW)
    if mask == "blocked":
        seen[0, :, : (t + 1) // 2] = False
    if mask in ("inf", "least"):
        seen[0, :, :, : s // 2] = False  # left padding: rows that see nothing, in additive form
    tensors = {"q": q, "k": k, "v": v, "zero_key": zero_key}
    tensors = {name: x.to(device, dtype).requires_grad_(grad) for name, x in tensors.items()}
    seen = seen.to(device)
    if mask == "none" or (mask == "causal" and (past == 0 or t == 1)):
        return Case(**tensors, is_causal=mask == "causal" and t > 1)
    if mask in ("inf", "least"):
        least = -torch.inf if mask == "inf" else torch.finfo(dtype).min
        return Case(**tensors, mask=torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, least))
    return Case(**tensors, mask=seen)


def oracle(x: Case) -> tuple[Tensor, Tensor]:
    """One more key and a value of zero, scores written out, softmax."""
    t, s, heads = x.q.shape[2], x.k.shape[2], x.q.shape[1]
    k, v, zero_key = (
        y.repeat_interleave(heads // y.shape[-3 if y.ndim == 4 else 0], -3 if y.ndim == 4 else 0)
        for y in (x.k, x.v, x.zero_key)
    )
    first = (x.q * (zero_key if zero_key.ndim == 4 else zero_key[:, None])).sum(-1, keepdim=True)
    scores = torch.cat([first, x.q @ k.mT], -1) * SCALE
    mask = torch.ones(t, s, dtype=torch.bool).tril() if x.is_causal else x.mask
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
        scores = scores + torch.nn.functional.pad(mask, (1, 0))
    weights = scores.softmax(-1)
    return weights @ torch.cat([torch.zeros_like(v[:, :, :1]), v], 2), weights[..., 0]


def reference(x: Case) -> tuple[Tensor, Tensor]:
    s0 = zero_scores(x.q, x.zero_key, SCALE)
    return zero_attention_reference(x.q, x.k, x.v, s0, mask=x.mask, is_causal=x.is_causal, scale=SCALE)


def sdpa(x: Case) -> tuple[Tensor, Tensor]:
    out, mass = zero_attention_sdpa(*x.inputs, mask=x.mask, is_causal=x.is_causal, scale=SCALE)
    assert mass is not None
    return out, mass


def lse(x: Case) -> tuple[Tensor, Tensor]:
    out, mass = zero_attention_lse(*x.inputs, mask=x.mask, is_causal=x.is_causal, scale=SCALE)
    assert mass is not None
    return out, mass


def flex(x: Case) -> tuple[Tensor, Tensor]:
    b, t, s, seen = len(x.q), x.q.shape[2], x.k.shape[2], x.mask
    if x.is_causal:
        seen = torch.ones(b, 1, t, s, dtype=torch.bool, device=x.q.device).tril()
    mask = None
    if seen is not None:
        mask = create_block_mask(lambda i, h, q, k: seen[i, 0, q, k], b, None, t, s, device=str(x.q.device))
    return zero_attention_flex(x.q, x.k, x.v, zero_scores(x.q, x.zero_key, SCALE), block_mask=mask, scale=SCALE)


FORMS: dict[str, Form] = {"reference": reference, "sdpa": sdpa, "lse": lse}


def worst(form: Form, x: Case) -> tuple[float, float]:
    """Largest difference to the oracle in float64, relative to the largest entry where that is above one: of output and
    mass, and of the gradients of a random weighting of both."""
    exact = x.exact
    ours, right = form(x), oracle(exact)
    forward = max(relative(a, b) for a, b in zip(ours, right, strict=True))
    if not x.q.requires_grad:
        return forward, 0.0
    draw = torch.Generator().manual_seed(9)
    weights = [torch.randn(y.shape, generator=draw) for y in right]
    gradients = []
    for results, inputs in ((ours, x.inputs), (right, exact.inputs)):
        total = sum((y * w.to(y)).sum() for y, w in zip(results, weights, strict=True))
        gradients.append(torch.autograd.grad(total, inputs))  # pyright: ignore[reportArgumentType]  # not an empty sum
    return forward, max(relative(a, b) for a, b in zip(*gradients, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.isfinite().all()
    return ((a.to(b.device).double() - b).abs().max() / b.abs().max().clamp_min(1)).item()
