"""What the cache is called is read off declarations, whatever the release and the family call it."""

from dataclasses import dataclass
from typing import Any, Optional

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationMixin

from tests.ztt.tiny import FAMILIES, gap, tiny, tiny_plain, tokens
from zerodraft import ZerodraftError
from zerodraft.models.caches import (
    CACHE,
    RETURNED,
    argument_of,
    cache_argument,
    declared,
    of_library,
    returned_by,
    the_one,
)


def past_form(hidden: Any, past_key_values: Cache | None = None) -> None: ...


def present_form(hidden: Any, use_cache: bool = False, cache: Cache | None = None) -> None: ...


def some_layers_form(hidden: Any, layer_past: Optional["Cache"] = None, use_cache: bool = False) -> None: ...


def without_annotations(hidden, layer_past=None, use_cache=False) -> None: ...


def next_form(hidden: Any, padding_cache: "PaddingCache | None" = None, memory: "Cache | None" = None) -> None: ...


def none(hidden: Any, use_cache: bool = False, cache_position: Any = None) -> None: ...


@dataclass
class PaddingCache:
    use_cache: bool = False


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (past_form, "past_key_values"),
        (present_form, "cache"),
        (some_layers_form, "layer_past"),
        (without_annotations, "layer_past"),
        (next_form, "memory"),
        (none, None),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_every_spelling_is_found_by_what_is_declared(function: Any, name: str | None) -> None:
    assert cache_argument(function) == name


def test_a_type_counts_more_than_a_name() -> None:
    assert declared([("cache", "dict"), ("states", "transformers.cache_utils.Cache | None")]) == "states"


@pytest.mark.parametrize("family", FAMILIES)
def test_models_and_layers_of_the_installed_release_have_one(family: str) -> None:
    model = tiny_plain(family)
    argument, cache = argument_of(model), DynamicCache(config=model.config)
    ids = tokens(1, 8)
    with torch.no_grad():
        first = model(ids[:, :5], **{argument: cache}, use_cache=True)
        rest = model(ids[:, 5:], **{argument: cache}, use_cache=True)
        assert returned_by(first) is cache
        assert cache.get_seq_length() == 8
        assert gap(rest.logits, model(ids).logits[:, 5:]) < 2e-5


def test_a_model_that_hands_on_its_arguments_takes_them_as_the_library_does() -> None:
    class Wrapper:
        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    assert argument_of(Wrapper()) == CACHE


def test_generate_has_it_and_a_release_without_it_is_told() -> None:
    assert cache_argument(GenerationMixin.prepare_inputs_for_generation) == CACHE
    with pytest.raises(ZerodraftError, match=r"transformers 5\..* has no cache in the inputs of `generate`"):
        of_library(cache_argument(none), "the inputs of `generate`")


def test_ours_take_both_names_in_every_release() -> None:
    model, ids = tiny(), tokens(1, 8)
    expected = model(ids).logits[:, 5:]
    for name in ("cache", "past_key_values"):
        past: Any = returned_by(model(ids[:, :5], use_cache=True))
        assert gap(model(ids[:, 5:], **{name: past}).logits, expected) < 1e-5
        assert getattr(model(ids, use_cache=True), RETURNED).get_seq_length() == 8
    cache = DynamicCache()
    assert the_one(cache, None) is the_one(None, cache) is cache
    with pytest.raises(ZerodraftError, match="two names of the same argument"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
