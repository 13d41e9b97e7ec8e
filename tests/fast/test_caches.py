"""Decoding with drafts over every kind of cache: told, given empty, or given with the beginning of the text in it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.generating import NEW, both, letters, model_of, prompts_of, spec_for
from tests.ztt.tiny import VOCABULARY, gap, tiny_plain, tokens
from zerodraft import ZerodraftError
from zerodraft.fast.lean import lean_target
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.caches import CACHE, returned_by

CACHES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "none": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "ztt"])
def test_kinds_of_cache(family: str, name: str) -> None:
    for rows in (1, 2):
        model, batch = model_of(family), prompts_of(rows)
        plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        spec = spec_for(plain, batch.get("attention_mask"))
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **CACHES[name]}
        assert torch.equal(plain, model.generate(**batch, custom_generate=spec, **options))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_caller_is_filled(family: str, kind: str) -> None:
    model, prompt = tiny_plain(family), tokens(1, 7)
    length = 7 + NEW
    plain, ours, _ = both(model, {"input_ids": prompt}, eos_token_id=None)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
    spec = spec_for(plain)
    options = {"do_sample": False, "eos_token_id": None}
    ours = model.generate(prompt, max_new_tokens=NEW, **{CACHE: cache}, custom_generate=spec, **options)
    assert torch.equal(plain, ours)
    assert cache.get_seq_length() == length - 1
    onward = model.generate(ours, max_new_tokens=5, **{CACHE: cache}, **options)
    assert torch.equal(onward, model.generate(plain, max_new_tokens=5, **options))


def conversation(model: Any, rows: int, kind: str) -> tuple[dict[str, Tensor], Any]:
    """A text whose beginning plain decoding has left in a cache, changed so that only who reads it goes on like it."""
    batch = prompts_of(rows)
    if kind == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(model.config, max_cache_len=96)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    said = model.generate(**batch, **{CACHE: cache}, **options)
    torch.manual_seed(3)
    for layer in cache.layers:
        # what a static cache has no text in stays as it is
        held = min(cache.get_seq_length(), layer.keys.shape[2])
        for states in (layer.keys[:, :, :held], layer.values[:, :, :held]):
            states += 2 * torch.randn_like(states)
    ids = torch.cat([said, tokens(rows, 4, seed=5)], 1)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}, cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "ztt"])
def test_a_text_that_a_cache_begins_goes_on(family: str, rows: int, kind: str) -> None:
    model = model_of(family)
    batch, cache = conversation(model, rows, kind)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    fresh = model.generate(**batch, **options)
    theirs = copy.deepcopy(cache)
    plain = model.generate(**batch, **{CACHE: theirs}, **options)
    assert not torch.equal(plain, fresh)
    spec = spec_for(plain, batch["attention_mask"])
    assert torch.equal(plain, model.generate(**batch, **{CACHE: cache}, custom_generate=spec, **options))
    assert spec.last_stats.accepted > 3
    assert cache.get_seq_length() == theirs.get_seq_length() == plain.shape[1] - 1
    mask = torch.cat([batch["attention_mask"], torch.ones(rows, NEW, dtype=torch.long)], 1)
    onward = [
        model.generate(plain, attention_mask=mask, **{CACHE: one}, **{**options, "max_new_tokens": 6})
        for one in (theirs, cache)
    ]
    assert torch.equal(*onward)


@pytest.mark.parametrize("rows", [1, 3])
def test_drafters_see_hidden_states_of_what_the_cache_holds(rows: int) -> None:
    model, batch = tiny_plain("gemma3"), prompts_of(rows)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    said = model.generate(**batch, **{CACHE: cache}, **options)
    mask = None
    if rows > 1:
        mask = torch.cat([batch["attention_mask"], torch.ones(rows, 8, dtype=torch.long)], 1)
    plain = model.generate(said, attention_mask=mask, **options)
    spec = spec_for(plain, mask)
    spec.drafter.taps = (0, 3)
    ours = model.generate(said, attention_mask=mask, **{CACHE: cache}, custom_generate=spec, **options)
    assert torch.equal(plain, ours)
    for row, answer in enumerate(plain):
        start = 0 if mask is None else int((mask[row] == 0).sum())
        taps = torch.cat([step[row].taps for step in spec.drafter.log])
        with torch.no_grad():
            hidden = model(answer[None, start : start + len(taps)], output_hidden_states=True).hidden_states
        assert gap(taps, torch.stack([hidden[0][0], hidden[3][0]], 1)) < 2e-5


def test_another_target_leaves_texts_that_a_cache_begins_alone() -> None:
    model = model_of("llama")
    batch, cache = conversation(model, 1, "dynamic")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**batch, **{CACHE: copy.deepcopy(cache)}, **options)
    spec = DiffuSpec(NoisyDrafter(plain.tolist(), VOCABULARY), make_target=lean_target)
    assert torch.equal(plain, model.generate(**batch, **{CACHE: cache}, custom_generate=spec, **options))


class Rounding(DynamicLayer):
    """Keeps something else than it was given, as quantised caches do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(key_states.round(decimals=1), value_states.round(decimals=1))


def test_caches_that_cannot_be_continued_are_named() -> None:
    model, spec = tiny_plain("llama"), spec_for(tokens(1, 60))
    options = {"max_new_tokens": 4, "custom_generate": spec}
    text = tokens(1, 7)
    with pytest.raises(ZerodraftError, match="layers of kind Rounding"):
        model.generate(text, **{CACHE: Cache(layers=[Rounding() for _ in range(4)])}, **options)
    cache = DynamicCache(config=model.config)
    model.generate(text, max_new_tokens=4, **{CACHE: cache}, do_sample=False, eos_token_id=None)
    with pytest.raises(ZerodraftError, match="holds 10 tokens and input_ids has 7; give the whole text"):
        model.generate(text, **{CACHE: cache}, **options)
    mask = torch.ones(1, 17, dtype=torch.long)
    with pytest.raises(ZerodraftError, match="give the whole text"):
        model.generate(text, attention_mask=mask, **{CACHE: cache}, **options)


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_returned_cache_holds_all_but_the_last_token(rows: int, make_target: Any) -> None:
    """Also where rows without an EOS go on behind their own ends; a text can be continued from it."""
    for seed in range(6):
        model = tiny_plain("llama", seed=seed)
        batch = {"input_ids": tokens(rows, 7, seed=seed)}
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        free = model.generate(**batch, **options)
        ends = [int(free[row, 7 + (3, 9, 5)[(row + seed) % 3]]) for row in range(rows)]
        options |= {"return_dict_in_generate": True, "stop_strings": [chr(33 + end) for end in ends]}
        options |= {"tokenizer": letters()}
        plain = model.generate(**batch, **options)
        ours = model.generate(**batch, **options, custom_generate=spec_for(plain.sequences, make_target=make_target))
        assert torch.equal(plain.sequences, ours.sequences)
        assert returned_by(ours).get_seq_length() == plain.sequences.shape[1] - 1
        seen = torch.ones_like(plain.sequences)
        onward = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": seen}
        again = model.generate(ours.sequences, **{CACHE: returned_by(ours)}, **onward)
        assert torch.equal(again, model.generate(plain.sequences, **onward))
