"""Sliding windows that a model's layers have, and those that stand in its configuration alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, DynamicCache, StaticCache

from tests.decoding.generating import spec_for
from tests.ztt.tiny import SIZES, VOCABULARY, randomise, tiny_plain, tokens
from zerodraft import ZerodraftError
from zerodraft.models.caches import CACHE

WINDOW = 8
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
OWN: dict[str, Callable[[Any], Any]] = {
    "bare": lambda model: DynamicCache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=64),
}
CASES = ["usual", "told static", "chunks", "no cache", *OWN, *(f"begun {kind}" for kind in OWN)]
DROPPING = {"told static", "chunks", "static", "begun dynamic", "begun static"}
"""Where plain decoding's cache drops tokens that layers without windows would look at."""


def options_of(case: str, model: Any, prompt: Tensor) -> dict[str, Any]:
    """Arguments of a `generate` call, with a cache of its own."""
    told: dict[str, dict[str, Any]] = {
        "usual": {},
        "told static": {"cache_implementation": "static"},
        "chunks": {"prefill_chunk_size": 3},
        "no cache": {"use_cache": False},
    }
    if case in told:
        return told[case]
    cache = OWN[case.removeprefix("begun ")](model)
    if case.startswith("begun"):
        with torch.no_grad():
            model(prompt[:, :-3], **{CACHE: cache})
    return {CACHE: cache}


def decoded(model: Any, case: str, prompt: Tensor, make_target: Any) -> tuple[Tensor, Tensor]:
    """What plain decoding writes, and what is written with drafts."""
    plain = model.generate(prompt, max_new_tokens=16, **GREEDY, **options_of(case, model, prompt))
    spec = spec_for(plain, make_target=make_target)
    options = options_of(case, model, prompt)
    ours = model.generate(prompt, max_new_tokens=16, **GREEDY, **options, custom_generate=spec)
    assert spec.last_stats.accepted > 3
    return plain, ours


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["mistral", "gemma3", "llama"])
def test_prompts_longer_than_the_window(family: str, case: str, make_target: Any) -> None:
    model, prompt = tiny_plain(family, sliding_window=WINDOW), tokens(1, 2 * WINDOW + 3)
    if family == "llama" and case in DROPPING:
        with pytest.raises(ZerodraftError, match=r"LlamaForCausalLM has no sliding windows, but .* sliding_window=8"):
            decoded(model, case, prompt, make_target)
    else:
        assert torch.equal(*decoded(model, case, prompt, make_target))


@pytest.mark.parametrize("case", CASES)
def test_texts_that_grow_over_a_window_of_the_configuration_alone(case: str) -> None:
    model, prompt = tiny_plain("llama", sliding_window=WINDOW), tokens(1, WINDOW)
    assert torch.equal(*decoded(model, case, prompt, None))


def test_two_kinds_of_layers_in_the_configuration_alone() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model, prompt = tiny_plain("llama", sliding_window=WINDOW, layer_types=kinds), tokens(1, 2 * WINDOW)
    assert torch.equal(*decoded(model, "bare", prompt, None))
    with pytest.raises(ZerodraftError, match="has no sliding windows"):
        decoded(model, "dynamic", prompt, None)


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_makes_its_masks_by_itself(case: str) -> None:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    model: Any = BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, **sizes, sliding_window=WINDOW)).eval()
    randomise(model)
    prompt = tokens(1, 2 * WINDOW + 3)
    if case in ("usual", "dynamic"):
        assert torch.equal(*decoded(model, case, prompt, None))
    else:
        with pytest.raises(ZerodraftError, match="makes its own attention masks"):
            decoded(model, case, prompt, None)
