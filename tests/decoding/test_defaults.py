"""What is decoded does not depend on torch's default dtype and device: they are the caller's, for other things."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.generating import prompts_of
from tests.drafters import tiny_dflash
from tests.fast.tape import Taped
from tests.ztt.tiny import VOCABULARY, tiny, tiny_plain
from zerodraft import (
    AutoregressiveDrafter,
    ContextProxy,
    DiffuSpec,
    FixedLength,
    HybridDrafter,
    PromptLookupDrafter,
    SearchConfig,
)
from zerodraft.decoding.protocols import Drafter, Target
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.masked_model import masked_from_target
from zerodraft.fast.graphed import graphed_target
from zerodraft.fast.int8 import Int8Linear
from zerodraft.fast.lean import LeanTarget, lean_target

OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": None}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}
TARGETS: dict[str, tuple[Callable[[], Any], Any]] = {
    "lean": (lambda: tiny_plain("llama", head_dim=16), "auto"),
    "lean, windows": (lambda: tiny_plain("mistral", head_dim=16), "auto"),
    "lean, a Zero Token Transformer": (lambda: tiny("qwen3"), "auto"),
    "its own": (lambda: tiny_plain("qwen2"), None),
    "its own, windows": (lambda: tiny_plain("gemma3"), None),
    "recorded": (lambda: tiny_plain("llama"), lambda model: graphed_target(model, recorder=Taped)),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_targets(default: str, name: str, rows: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, make_target = TARGETS[name]
    if not kernels and make_target != "auto":
        pytest.skip("has no use for kernels")
    model, batch = make(), prompts_of(rows)
    if not kernels:
        monkeypatch.setattr("zerodraft.fast.packed.kernels", lambda: None)
        monkeypatch.setattr("zerodraft.fast.lean.compiled_layers.kernels", lambda: None)
    plain = model.generate(**batch, **OPTIONS, do_sample=False)
    starts = [0] * rows if rows == 1 else (batch["attention_mask"] == 0).sum(1).tolist()
    texts = [row[start:].tolist() for row, start in zip(plain, starts, strict=True)]
    made: list[Target | None] = []

    def noted(model: Any) -> Target | None:
        made.append(lean_target(model) if make_target == "auto" else make_target(model))
        return made[-1]

    spec = DiffuSpec(NoisyDrafter(texts, VOCABULARY, right=0.8), make_target=None if make_target is None else noted)
    with DEFAULTS[default]():
        out = model.generate(**batch, **OPTIONS, do_sample=False, custom_generate=spec)
    assert torch.equal(out, plain)
    if make_target == "auto":
        assert isinstance(made[0], LeanTarget)


DRAFTERS: dict[str, Callable[[Any], Drafter]] = {
    "lookup": lambda model: PromptLookupDrafter(),
    "autoregressive": lambda model: AutoregressiveDrafter(tiny_plain("llama", num_hidden_layers=2), max_length=5),
    "masked": lambda model: MaskedDrafter(
        masked_from_target(tiny_plain("qwen2"), 1, block_size=4), vocab_size=VOCABULARY
    ),
    "block": lambda model: BlockDrafter(drafter_from_target(model, num_layers=1, block_size=4).eval(), model),
    # by the copy alone: what steps took would decide what is drawn
    "hybrid": lambda model: HybridDrafter(other=DRAFTERS["block"](model), least_gain=0.15),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters(default: str, name: str, sample: bool) -> None:
    model, batch = tiny_plain("llama", head_dim=16), prompts_of(1)
    search = SearchConfig(expand="best_first", budget=9)
    written = []
    for defaults in (nullcontext, DEFAULTS[default]):
        torch.manual_seed(0)
        spec = DiffuSpec(
            DRAFTERS[name](model),
            proxy=ContextProxy(VOCABULARY),
            search=search,
            length=FixedLength(4),
            sample_drafts=sample,
        )
        with defaults():
            out = model.generate(**batch, **OPTIONS, do_sample=sample, custom_generate=spec)
        assert spec.last_stats is not None
        written.append((out[0].tolist(), spec.last_stats.accepted))
    assert written[0] == written[1]


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_dflash_drafter(default: str) -> None:
    target, drafter = tiny_dflash.make()
    batch = {"input_ids": torch.arange(3, 12)[None]}
    made = DFlashDrafter(drafter, target)
    plain = target.generate(**batch, **OPTIONS, do_sample=False)
    with DEFAULTS[default]():
        out = target.generate(**batch, **OPTIONS, do_sample=False, custom_generate=DiffuSpec(made))
    assert torch.equal(out, plain)


@pytest.mark.parametrize("default", DEFAULTS)
def test_int8_products(default: str) -> None:
    weight, x = torch.randn(8, 16), torch.randn(2, 16)
    wanted = Int8Linear(weight)(x)
    with DEFAULTS[default]():
        found = Int8Linear(weight)(x)
    assert torch.equal(found, wanted)
