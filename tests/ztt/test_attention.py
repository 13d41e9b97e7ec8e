"""Every form of zero-token attention equals one oracle, forward and backward; and the comparison can fail."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ztt.attending import FORMS, SCALE, Case, Form, case, flex, lse, oracle, relative, sdpa, worst
from zerodraft.ztt.attention import (
    AdditiveMask,
    has_lse_kernel,
    has_step_form,
    zero_attention_lse,
    zero_attention_reference,
    zero_attention_sdpa,
    zero_scores,
)

MASKS = ["none", "causal", "bool", "inf", "least", "window", "blocked"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree(form: str, mask: str) -> None:
    for past in (0, 3):
        forward, backward = worst(FORMS[form], case(past=past, mask=mask))
        assert forward <= 1e-6
        assert backward <= 1e-5
        assert worst(FORMS[form], case(past=past, mask=mask, dtype=torch.float64)) < (1e-12, 1e-11)


shapes = {
    "b": st.integers(1, 3),
    "kv": st.integers(1, 3),
    "groups": st.integers(1, 3),
    "t": st.integers(1, 9),
    "past": st.integers(0, 8),
    "d": st.sampled_from([1, 3, 4, 8, 16, 24]),
    "mask": st.sampled_from(MASKS),
    "grad": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries(shapes))
def test_forms_agree_for_all_shapes(shape: dict) -> None:
    x = case(**shape)
    for form in FORMS.values():
        forward, backward = worst(form, x)
        assert forward <= 2e-6
        assert backward <= 1e-5


@pytest.mark.parametrize("form", ["reference", "lse"])
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("mask", ["causal", "blocked"])
def test_one_zero_key_for_each_query(form: str, t: int, mask: str) -> None:
    forward, backward = worst(FORMS[form], case(t=t, past=2, mask=mask, per_query=True))
    assert forward <= 1e-6
    assert backward <= 1e-5
    assert worst(FORMS[form], case(t=t, past=2, mask=mask, per_query=True, grad=False))[0] <= 1e-6


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_one_decoding_step(form: str, groups: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        x = case(b=3, kv=2, groups=groups, t=1, past=11, mask="none", grad=False, dtype=dtype)
        untouched = [y.clone() for y in x.inputs]
        assert worst(FORMS[form], x)[0] <= tolerance
        assert all(torch.equal(a, b) for a, b in zip(x.inputs, untouched, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["causal", "bool", "least", "inf", "blocked"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form: str, mask: str, dtype: torch.dtype) -> None:
    x = case(mask=mask, dtype=dtype)
    forward, backward = worst(FORMS[form], x)
    unit = torch.finfo(dtype).eps
    assert forward <= 4 * unit
    assert backward <= 8 * unit
    out, mass = FORMS[form](x)
    assert out.dtype == mass.dtype == dtype


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "window"])
@pytest.mark.parametrize("groups", [1, 2])
def test_flex_attention(mask: str, groups: int) -> None:
    """Uncompiled and forward only, as far as it goes on a CPU."""
    assert worst(flex, case(t=9, d=16, groups=groups, mask=mask, grad=False))[0] <= 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["blocked", "inf", "least"])
def test_a_query_that_sees_nothing_gives_all_to_the_zero_token(form: str, mask: str) -> None:
    x = case(mask=mask)
    out, mass = FORMS[form](x)
    assert torch.equal(mass[0, :, :3], torch.ones_like(mass[0, :, :3]))
    assert torch.equal(out[0, :, :3], torch.zeros_like(out[0, :, :3]))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    """Finite differences in float64, through the output and through the mass alike."""
    for mask in ("causal", "blocked"):
        x = case(b=1, kv=1, groups=2, t=3, past=1 if mask == "blocked" else 0, d=3, mask=mask, dtype=torch.float64)

        def run(*inputs: Tensor, x: Case = x) -> tuple[Tensor, Tensor]:
            return FORMS[form](Case(*inputs, x.mask, x.is_causal))

        assert torch.autograd.gradcheck(run, x.inputs)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result_alone(used: int) -> None:
    x = case()
    for form in (sdpa, lse):
        ours = torch.autograd.grad(form(x)[used].square().sum(), x.inputs, allow_unused=True)
        right = torch.autograd.grad(oracle(x)[used].square().sum(), x.inputs, allow_unused=True)
        for a, b in zip(ours, right, strict=True):
            assert relative(torch.zeros_like(a) if a is None else a, torch.zeros_like(a) if b is None else b) <= 1e-5


def without_the_factor(x: Case) -> tuple[Tensor, Tensor]:
    """Wrong: the attention's output without (1 - a0)."""
    out, mass = lse(x)
    return out / (1 - mass[..., None]), mass


def without_the_scale(x: Case) -> tuple[Tensor, Tensor]:
    """Wrong: the zero token's score is not scaled."""
    return lse(replace(x, zero_key=x.zero_key / SCALE))


def with_heads_in_the_wrong_order(x: Case) -> tuple[Tensor, Tensor]:
    """Wrong: query heads are dealt to the zero keys in turn, not in groups."""
    return lse(replace(x, zero_key=x.zero_key.flip(0)))


def without_the_gradient_of_the_mass(x: Case) -> tuple[Tensor, Tensor]:
    """Wrong in the backward pass only."""
    out, mass = lse(x)
    return out, mass.detach()


def with_a_value(x: Case) -> tuple[Tensor, Tensor]:
    """Wrong: the zero token's value is not quite zero."""
    out, mass = lse(x)
    return out + 1e-3 * mass[..., None], mass


@pytest.mark.parametrize("wrong", [without_the_factor, without_the_scale, with_heads_in_the_wrong_order, with_a_value])
def test_a_wrong_form_is_noticed(wrong: Form) -> None:
    assert worst(wrong, case())[0] > 1e-5


def test_a_wrong_gradient_is_noticed() -> None:
    forward, backward = worst(without_the_gradient_of_the_mass, case())
    assert forward <= 1e-6
    assert backward > 1e-3


@pytest.mark.parametrize("need_mass", [True, False])
@pytest.mark.parametrize("t", [1, 6])
def test_the_output_does_not_depend_on_whether_the_mass_is_wanted(t: int, need_mass: bool) -> None:
    x = case(t=t, past=2, mask="bool" if t > 1 else "none", grad=False)
    for form in (zero_attention_sdpa, zero_attention_lse):
        out, mass = form(*x.inputs, mask=x.mask, is_causal=x.is_causal, scale=SCALE, need_mass=need_mass)
        assert relative(out, oracle(x.exact)[0]) <= 1e-6
        assert (mass is not None) or not need_mass


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", ["none", "bool", "window", "blocked", "inf", "least"])
@torch.no_grad()
def test_one_query_a_row_equals_the_oracle(mask: str, groups: int) -> None:
    """The form of a decoding step, with what it takes for a mask; the output may not depend on who reads the mass."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        x = case(b=3, groups=groups, t=1, past=7, mask=mask, grad=False, dtype=dtype)
        assert has_step_form(x.q, x.zero_key, None if x.mask is None else AdditiveMask.of(x.mask, x.q))
        expected, expected_mass = oracle(x.exact)
        out, mass = lse(x)
        assert relative(out, expected) <= bound
        assert relative(mass, expected_mass) <= bound
        unread, none = zero_attention_lse(*x.inputs, mask=x.mask, is_causal=False, scale=SCALE, need_mass=False)
        assert torch.equal(unread, out)
        assert none is None


def test_the_form_of_a_decoding_step_is_for_nothing_else() -> None:
    x = case(t=1, past=3, mask="none", grad=False)
    assert not has_step_form(x.q, x.zero_key, None), "gradients"
    with torch.no_grad():
        assert has_step_form(x.q, x.zero_key, None)
        longer, per_query, half = case(t=2), case(t=1, per_query=True), case(t=1, dtype=torch.bfloat16)
        assert not any(has_step_form(y.q, y.zero_key, None) for y in (longer, per_query, half))
        per_head = AdditiveMask.of(torch.ones(2, x.q.shape[1], 1, 4, dtype=torch.bool), x.q)
        assert not has_step_form(x.q, x.zero_key, per_head)


@pytest.mark.parametrize("form", [zero_attention_reference, zero_attention_sdpa])
def test_dropout_keeps_the_expected_output(form: Callable) -> None:
    x = case(b=1, kv=1, t=4, grad=False)
    zero = zero_scores(x.q, x.zero_key, SCALE) if form is zero_attention_reference else x.zero_key
    torch.manual_seed(0)
    many = Case(*(y.repeat(2000, *[1] * (y.ndim - 1)) for y in (x.q, x.k, x.v)), x.zero_key, is_causal=True)
    zero = zero.repeat(2000, 1, 1) if form is zero_attention_reference else zero
    out, _ = form(many.q, many.k, many.v, zero, mask=None, is_causal=True, scale=SCALE, dropout=0.25)
    assert (out.mean(0) - oracle(x)[0][0]).abs().max() < 0.06
    assert out.std(0).max() > 0.1


def test_capability_on_the_cpu() -> None:
    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    assert has_lse_kernel(q, k, None, True, 0.0, True)
    assert has_lse_kernel(q, k, torch.ones(5, 5, dtype=torch.bool), False, 0.0, False)
    assert not has_lse_kernel(q, k, None, True, 0.1, True)
    assert not has_lse_kernel(q.to("meta"), k.to("meta"), None, True, 0.0, False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"d": 12}, False),
        ({"d": 264}, False),
        ({"s": 9}, False),
        ({"s": 9, "causal": False}, True),
        ({"masked": True}, False),
        ({"grad": True}, False),
    ],
)
def test_capability_on_cuda(changes: dict, expected: bool) -> None:
    """The flash operator returns its LSE for half precision without a mask, and nothing differentiates it here."""
    fixed = {"dtype": torch.float16, "d": 64, "s": 5, "causal": True, "masked": False, "grad": False} | changes
    with FakeTensorMode():
        q, k = (torch.empty(1, 4, n, fixed["d"], dtype=fixed["dtype"], device="cuda") for n in (5, fixed["s"]))
        mask = torch.empty(5, fixed["s"], device="cuda") if fixed["masked"] else None
        assert has_lse_kernel(q, k, mask, fixed["causal"], 0.0, fixed["grad"]) is expected
