"""Attention with a zero token: one virtual token with a trainable key and a value of zero.

With value zero the token needs no KV slot, no mask column and no position shift (METHODS: checked to 1e-15):

    a0  = sigmoid(q.k0 * scale - LSE)        LSE: log-sum-exp of the ordinary scores
    out = (1 - a0) * ordinary attention

`a0` is the mass that lands on the zero token; it is the exit signal. Three equal forms, each returns `(out, a0)`:

* `zero_attention_reference`: softmax over the concatenated scores. The oracle, and the `eager` implementation.
* `zero_attention_sdpa`: the zero token put in front of the keys of `scaled_dot_product_attention`, fused and portable.
* `zero_attention_lse`: the two lines above on a fused kernel that returns its LSE, no copy of keys and values. On CPUs
  its backward reuses the kernel's own with the zero token's share in LSE and output, which gives exact gradients.
  `zero_attention_step` is the same for one query per row, where every small operation counts.

Shapes: b batch, h query heads, kv KV heads, t queries, s keys, d head size. Keys and values may have fewer heads than
the queries (GQA). Masks are bool (True attends) or additive, broadcastable to `(b, h, t, s)`; `None` with
`is_causal=True` is the square causal mask.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# The binding, not `torch.ops`: it costs a third of the time that the kernel takes for one query.
_cpu_flash = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_flash = torch.ops.aten._scaled_dot_product_flash_attention

Mass = Float[Tensor, "b h t"]
Query = Float[Tensor, "b h t d"]
Keys = Float[Tensor, "b kv s d"]


class AdditiveMask(NamedTuple):
    """A mask as the CPU kernel takes it; all layers of a forward pass can share one.

    Attributes:
        values: `(b, h or 1, t, s)`, added to the scores.
        blocked: `(b, h or 1, t)` bool, queries that may attend to nothing.
    """

    values: Tensor
    blocked: Tensor

    @classmethod
    def of(cls, mask: Tensor, q: Query) -> "AdditiveMask":
        """Convert a bool or additive mask for the queries of `q`."""
        values = mask.expand(q.shape[0], -1, q.shape[2], -1)
        if mask.dtype == torch.bool:
            values = torch.zeros_like(values, dtype=q.dtype).masked_fill_(~values, -torch.inf)
        return cls(values, (values <= torch.finfo(values.dtype).min).all(-1))


def zero_scores(
    q: Query, zero_key: Float[Tensor, "kv d"] | Float[Tensor, "#b kv t d"], scale: float
) -> Float[Tensor, "b h t"]:
    """Score of the zero token for every query and head; the key is one for all queries, or one for each."""
    b, h, t, d = q.shape
    kv = zero_key.shape[0] if zero_key.ndim == 2 else zero_key.shape[1]
    if zero_key.ndim == 2:
        grouped = q.reshape(b, kv, (h // kv) * t, d)
        scores = grouped @ zero_key.to(q.dtype)[:, :, None]
    else:
        scores = (q.reshape(b, kv, h // kv, t, d) * zero_key.to(q.dtype)[:, :, None]).sum(-1)
    return scores.reshape(b, h, t) * scale


def zero_attention_weights(
    q: Query, k: Keys, s0: Mass, *, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Float[Tensor, "b h t s"], Mass]:
    """Softmax over `[s0, scores]`, written out: the weights of the keys, and the mass on the zero token."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    exact = torch.promote_types(q.dtype, torch.float32)
    weights = torch.cat([s0[..., None], scores], dim=-1).softmax(-1, dtype=exact).to(q.dtype)
    return weights[..., 1:], weights[..., 0]


def zero_attention_reference(
    q: Query, k: Keys, v: Keys, s0: Mass, *, mask: Tensor | None, is_causal: bool, scale: float, dropout: float = 0.0
) -> tuple[Query, Mass]:
    """Attention with these weights. Returns the output and the mass on the zero token."""
    weights, a0 = zero_attention_weights(q, k, s0, mask=mask, is_causal=is_causal, scale=scale)
    return weighted_values(weights, v, dropout), a0


def weighted_values(weights: Float[Tensor, "b h t s"], v: Keys, dropout: float = 0.0) -> Query:
    """What attention with these weights takes from the values."""
    return F.dropout(weights, dropout) @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


def zero_attention_sdpa(
    q: Query,
    k: Keys,
    v: Keys,
    zero_key: Float[Tensor, "kv d"],
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float = 0.0,
    need_mass: bool = True,
) -> tuple[Query, Mass | None]:
    """The zero token as a first key of `scaled_dot_product_attention`; every fused kernel applies, gradients are exact.

    A square causal mask stays one: a zero query is put in front as well and its row dropped. The mass comes out as
    one more column of the values that is 1 for the zero token and 0 elsewhere (`need_mass`), with its gradient.
    """
    b, h, t, d = q.shape
    groups = h // k.shape[1]
    k = torch.cat([zero_key.to(k.dtype)[None, :, None].expand(b, -1, 1, d), k], dim=2)
    v = F.pad(v, (0, 0, 1, 0))
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if need_mass:
        # Eight columns, not one: the fused CUDA kernels want head sizes that are multiples of eight.
        q, k, v = F.pad(q, (0, 8)), F.pad(k, (0, 8)), F.pad(v, (0, 8))
        v[:, :, 0, d] = 1
    if is_causal:
        q = F.pad(q, (0, 0, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True) if mask.dtype == torch.bool else F.pad(mask, (1, 0))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, dropout_p=dropout)
    out = out[:, :, -t:]
    return (out[..., :d], out[..., d]) if need_mass else (out, None)


class _CpuFlashZeroToken(torch.autograd.Function):
    """LSE form on the CPU's flash kernel, with exact gradients for q, k, v and s0 and through the mass.

    The kernel's backward recomputes the probabilities from the LSE and needs `rowsum(dout * out)`. Given the LSE and
    the output *with* the zero token it therefore returns the exact gradients of the ordinary tokens. The zero token's
    own are `ds0 = a0 * (0 - rowsum(dout * out))`, as its value is zero. A gradient `g` of the mass shifts every score's
    gradient by `-p_j * a0 * g`: the same as one more column with value 0, `dout` 1 and output `a0 * g`.
    """

    @staticmethod
    def forward(ctx, q, k, v, s0, mask, blocked, is_causal, scale):
        out, lse = _cpu_flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        out, a0, lse = _fold_in(out, lse, s0, blocked)
        ctx.save_for_backward(q, k, v, out, lse, a0, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.set_materialize_grads(False)
        return out, a0

    @staticmethod
    def backward(ctx, grad_out, grad_a0):
        q, k, v, out, lse, a0, mask = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        delta = (grad_out * out).sum(-1, dtype=lse.dtype)
        args, d = (grad_out.to(q.dtype), q, k, v, out), q.shape[-1]
        if grad_a0 is not None:
            shift = a0.to(lse.dtype) * grad_a0.to(lse.dtype)
            delta = delta + shift - grad_a0.to(lse.dtype)
            columns = (torch.ones_like(shift), None, None, None, shift)
            args = tuple(_with_column(x, column) for x, column in zip(args, columns, strict=True))
        grads = _cpu_flash_backward(*args, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale)
        grad_q, grad_k, grad_v = (g[..., :d] for g in grads)
        return grad_q, grad_k, grad_v, (-a0 * delta).to(q.dtype), None, None, None, None


def _with_column(x: Tensor, column: Tensor | None) -> Tensor:
    """`x` with one more entry in its last dimension (zero unless given)."""
    if column is None:
        return F.pad(x, (0, 1))
    return torch.cat([x, column.to(x.dtype)[..., None]], dim=-1)


def _fold_in(out: Tensor, lse: Tensor, s0: Tensor, blocked: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mass and LSE with the zero token, from those without it."""
    s0 = s0.to(lse.dtype)
    if blocked is not None:
        # The kernel reports an LSE of 0 for a query that may attend to nothing (left padding): the truth is -inf.
        lse = lse.masked_fill(blocked, -torch.inf)
    a0 = torch.sigmoid(s0 - lse)
    return out * (1 - a0).to(out.dtype)[..., None], a0.to(out.dtype), torch.logaddexp(lse, s0)


def has_lse_kernel(q: Query, k: Keys, mask: Tensor | None, is_causal: bool, dropout: float, needs_grad: bool) -> bool:
    """Whether a fused kernel here returns the LSE for these inputs (else the SDPA form computes the same)."""
    if dropout > 0:
        return False
    if q.device.type == "cpu":
        return True
    square = not is_causal or q.shape[2] == k.shape[2]
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cuda" and torch.version.hip is None and half and mask is None and square and not needs_grad


def zero_attention_lse(
    q: Query,
    k: Keys,
    v: Keys,
    zero_key: Float[Tensor, "kv d"] | Float[Tensor, "#b kv t d"],
    *,
    mask: Tensor | AdditiveMask | None,
    is_causal: bool,
    scale: float,
    need_mass: bool = True,
) -> tuple[Query, Mass | None]:
    """The LSE form. Only for inputs of which `has_lse_kernel` is true."""
    if q.device.type == "cuda":
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out, lse, *_ = _cuda_flash(q, k, v, 0.0, is_causal, False, scale=scale)
        return _fold_in(out, lse[..., : q.shape[2]], zero_scores(q, zero_key, scale), None)[:2]
    if isinstance(mask, Tensor):
        mask = AdditiveMask.of(mask, q)
    if has_step_form(q, zero_key, mask):
        return zero_attention_step(q, k, v, zero_key, mask=mask, scale=scale, need_mass=need_mass)
    s0 = zero_scores(q, zero_key, scale)
    values, blocked = (None, None) if mask is None else mask
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, zero_key)):
        return _CpuFlashZeroToken.apply(q, k, v, s0, values, blocked, is_causal, scale)
    out, lse = _cpu_flash(q, k, v, 0.0, is_causal, attn_mask=values, scale=scale)
    return _fold_in(out, lse, s0, blocked)[:2]


def has_step_form(q: Query, zero_key: Tensor, mask: AdditiveMask | None) -> bool:
    """Whether `zero_attention_step` takes these inputs, on a CPU."""
    return (
        q.shape[2] == 1
        and not torch.is_grad_enabled()
        and zero_key.ndim == 2
        and zero_key.dtype == q.dtype
        and q.dtype in (torch.float32, torch.float64)
        and (mask is None or mask.values.shape[1] == 1)
    )


def zero_attention_step(
    q: Query,
    k: Keys,
    v: Keys,
    zero_key: Float[Tensor, "kv d"],
    *,
    mask: AdditiveMask | None,
    scale: float,
    need_mass: bool,
) -> tuple[Query, Mass | None]:
    """The LSE form for one query per row, without gradients, on a CPU. Only where `has_step_form` is true.

    A decoding step of a small model is paid for by the number of small operations. The query heads of a KV head go in
    as its queries, which reads the keys once, and the share of the ordinary tokens is `sigmoid(LSE - q.k0 * scale)`.
    """
    b, h, _, d = q.shape
    kv = k.shape[1]
    grouped = q if h == kv else q.reshape(b, kv, h // kv, d)
    if mask is None:
        out, lse = _cpu_flash(grouped, k, v, 0.0, False, scale=scale)
    else:
        values = mask.values if h == kv else mask.values.expand(-1, -1, h // kv, -1)
        out, lse = _cpu_flash(grouped, k, v, 0.0, False, attn_mask=values, scale=scale)
        lse = lse.masked_fill(mask.blocked, -torch.inf)  # see `_fold_in`
    share = torch.sub(lse.unsqueeze(-1), grouped @ zero_key.unsqueeze(-1), alpha=scale).sigmoid_()
    out = out.mul_(share)
    mass = (1 - share).reshape(b, h, 1) if need_mass else None
    return (out if h == kv else out.reshape(b, h, 1, d)), mass


def zero_attention_flex(
    q: Query, k: Keys, v: Keys, s0: Mass, *, block_mask: object, scale: float
) -> tuple[Query, Mass]:
    """The LSE form on `flex_attention`, whose LSE carries its own gradient; the mask is a flex `BlockMask` or None."""
    from torch.nn.attention.flex_attention import AuxRequest

    gqa, aux_request = q.shape[1] != k.shape[1], AuxRequest(lse=True)
    kernel = _flex_kernel(compiled=q.device.type != "cpu")
    out, aux = kernel(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=gqa, return_aux=aux_request)
    return _fold_in(out, aux.lse, s0, None)[:2]


@functools.cache
def _flex_kernel(compiled: bool) -> Callable[..., tuple[Tensor, Any]]:
    """`flex_attention`, which is fused only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
