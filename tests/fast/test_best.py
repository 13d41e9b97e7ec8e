"""What `DiffuSpec` runs a model with when it is not told: the fast path where there is one, and how to be rid of it."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zerodraft
from tests.decoding.generating import MODELS, NEW, both, model_of, prompts_of
from tests.ztt.tiny import tiny_plain, tokens
from zerodraft import DiffuSpec, PromptLookupDrafter
from zerodraft.decoding.protocols import Target
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.generate.decoder import decoder
from zerodraft.models.caches import CACHE

OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", MODELS)
def test_the_automatic_choice_writes_the_same_text(family: str, rows: int, made: list[Target | None]) -> None:
    plain, ours, spec = both(model_of(family), prompts_of(rows), noise={"make_target": "auto"}, eos_token_id=None)
    assert torch.equal(plain, ours)
    assert spec.last_stats.accepted > 3
    assert len(made) == 1
    if family in ("llama", "mistral", "qwen2", "qwen3", "ztt"):
        assert isinstance(made[0], LeanTarget)


SPECS: dict[str, Callable[[Any], DiffuSpec]] = {
    "as it comes": lambda model: DiffuSpec(PromptLookupDrafter()),
    "commands": lambda model: decoder(model, PromptLookupDrafter()),
    "own": lambda model: DiffuSpec(PromptLookupDrafter(), make_target=None),
}


@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_default_and_can_be_switched_off(name: str, made: list[Target | None]) -> None:
    model = tiny_plain("llama")
    spec = SPECS[name](model)
    made.clear()
    model.generate(tokens(1, 7), custom_generate=spec, **OPTIONS)
    assert [type(target) for target in made] == ([] if name == "own" else [LeanTarget])


def test_texts_that_begin_in_a_cache_take_the_models_own_pass(made: list[Target | None]) -> None:
    model, prompt, spec = tiny_plain("llama"), tokens(1, 7), DiffuSpec(PromptLookupDrafter())
    with torch.no_grad():
        cache = model(prompt[:, :4], use_cache=True).past_key_values
    out = model.generate(prompt, **{CACHE: cache}, custom_generate=spec, **OPTIONS)
    assert torch.equal(out, model.generate(prompt, **OPTIONS))
    assert not made


def test_memory_is_given_back() -> None:
    model, prompt, spec = tiny_plain("llama"), tokens(1, 7), DiffuSpec(PromptLookupDrafter())
    plain = model.generate(prompt, **OPTIONS)
    model.generate(prompt, custom_generate=spec, **OPTIONS)
    target = lean_target(model)
    assert target is not None
    packed = weakref.ref(target._weights.final_gain)
    del target
    zerodraft.release(model)
    gc.collect()
    assert packed() is None
    assert torch.equal(plain, model.generate(prompt, custom_generate=spec, **OPTIONS))
    zerodraft.release(tiny_plain("gemma3"))  # nothing to give back
