"""transformers' `generate` in all its ways, with and without early exit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tests.ztt.test_exits import splitting
from tests.ztt.tiny import gap, left_padded, tiny, tiny_plain, tokens
from tests.ztt.unrolled import unroll
from zerodraft import ConfidenceExit, FixedExit
from zerodraft.models.caches import CACHE

FAMILIES = ["llama", "mistral", "gemma3", "gpt2", "opt"]
NEW = 8


def write(model: Any, ids: Tensor, **options: Any) -> Any:
    """A fixed number of new tokens: no text ends early."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_the_unrolled_model_with_every_cache(family: str) -> None:
    model, ids = tiny(family), tokens(2, 5)
    expected = write(unroll(model), ids, use_cache=False)
    assert expected.shape == (2, 5 + NEW)
    assert torch.equal(write(model, ids), expected)
    assert torch.equal(write(model, ids, use_cache=False), expected)
    assert torch.equal(write(model, ids, cache_implementation="static"), expected)
    assert torch.equal(write(model, ids, prefill_chunk_size=2), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams(family: str, options: dict[str, Any]) -> None:
    model, ids = tiny(family), tokens(2, 5)
    expected = write(unroll(model), ids, use_cache=False, **options)
    assert torch.equal(write(model, ids, **options), expected)


def test_sampling_with_a_seed() -> None:
    model, ids, texts = tiny("llama"), tokens(2, 5), []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        texts.append(write(model, ids, do_sample=True, temperature=1.3, top_k=20, top_p=0.9, **options))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], write(model, ids))


def test_quantised_cache() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    assert torch.equal(write(model, ids, **options), write(unroll(model), ids, **options))


def test_assisted_decoding() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    expected = write(model, ids)
    assert torch.equal(write(model, ids, assistant_model=tiny_plain("llama", seed=4)), expected)
    assert torch.equal(write(model, ids, assistant_model=model), expected)
    assert torch.equal(write(model, ids, assistant_model=tiny("llama", seed=4)), expected)
    repeating = ids.repeat(1, 3)
    assert torch.equal(write(model, repeating, prompt_lookup_num_tokens=3), write(model, repeating))


def test_as_the_assistant_of_a_plain_model() -> None:
    plain, ids = tiny_plain("llama"), tokens(1, 6)
    assert torch.equal(write(plain, ids, assistant_model=tiny("llama", seed=4)), write(plain, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_equal_each_row_alone(family: str) -> None:
    model = tiny(family)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 7, 5)]
    batch = left_padded(rows)
    for options in ({}, {"cache_implementation": "static"}):
        out = write(model, batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        for index, row in enumerate(rows):
            assert torch.equal(out[index, 7:], write(model, row[None])[0, len(row) :])


def test_continued_from_a_cache() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    whole = write(model, ids)
    first = write(model, ids, max_new_tokens=3, return_dict_in_generate=True)
    rest = write(model, first.sequences, max_new_tokens=NEW - 3, **{CACHE: first.past_key_values})
    assert torch.equal(rest, whole)


def test_from_embeddings() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    assert gap(model(inputs_embeds=embeddings).logits, model(ids).logits) <= 1e-6
    out = model.generate(
        inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(out, write(model, ids)[:, 5:])


@torch.no_grad()
def test_hidden_states_are_those_of_the_unrolled_model() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    ours = model(ids, output_hidden_states=True).hidden_states
    theirs = unroll(model)(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 9
    for mine, right in zip(ours, theirs, strict=True):
        assert gap(mine, right) <= 1e-5


def test_scores_and_hidden_states_of_generation() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    out = write(
        model, ids, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
    )
    whole = model(out.sequences[:, :-1]).logits[:, 4:]
    assert gap(torch.stack(out.scores, 1), whole) <= 1e-5
    assert gap(torch.stack(out.logits, 1), whole) <= 1e-5
    assert [len(states) for states in out.hidden_states] == [9] * NEW
    assert out.past_key_values.get_seq_length() == 5 + NEW - 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_logits_to_keep(family: str) -> None:
    model, ids = tiny(family), tokens(2, 7)
    whole = model(ids).logits
    assert gap(model(ids, logits_to_keep=1).logits, whole[:, -1:]) <= 1e-6
    assert gap(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]]) <= 1e-6
    rule = splitting(model)
    whole = model(ids, exit_rule=rule).logits
    assert gap(model(ids, exit_rule=rule, logits_to_keep=2).logits, whole[:, -2:]) <= 1e-6


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


def test_streamer() -> None:
    model, ids, streamer = tiny("llama"), tokens(1, 5), Collected()
    out = write(model, ids, streamer=streamer, exit_rule=splitting(model))
    assert streamer.ids == [*out[0].tolist(), -1]


# -- with early exit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["propagate", "latest"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_depths_of_a_greedy_text(family: str, policy: Any) -> None:
    model, ids = tiny(family), tokens(2, 5)
    settings = {"exit_rule": splitting(model), "exit_policy": policy}
    text = write(model, ids, **settings)
    again = model(text[:, :-1], **settings)
    assert torch.equal(text[:, 5:], again.logits[:, 4:].argmax(-1))
    assert model.last_exit is not None
    assert torch.equal(model.last_exit, again.exit_depth)
    assert len(model.last_exit.unique()) > 1
    assert torch.equal(write(model, ids, use_cache=False, **settings), text)
    assert torch.equal(write(model, ids, cache_implementation="static", **settings), text)
    assert torch.equal(model.last_exit, again.exit_depth)
    write(model, ids)
    assert model.last_exit is None


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_depths_of_left_padded_rows(family: str, cache: str | None) -> None:
    model = tiny(family)
    rule, rows = splitting(model), [tokens(1, length, seed=length)[0] for length in (3, 7, 5)]
    batch = left_padded(rows)
    options = {"exit_rule": rule, "cache_implementation": cache}
    out = write(model, batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    depths = model.last_exit
    assert depths is not None
    assert depths.shape == (3, 7 + NEW - 1)
    for index, row in enumerate(rows):
        pad = 7 - len(row)
        assert torch.equal(out[index, 7:], write(model, row[None], exit_rule=rule)[0, len(row) :])
        assert depths[index, :pad].eq(0).all()
        assert model.last_exit is not None
        assert torch.equal(depths[index, pad:], model.last_exit[0])


def test_depths_survive_the_rollbacks_of_assisted_decoding() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    rule = splitting(model)
    expected = write(model, ids, exit_rule=rule)
    depths = model.last_exit
    for options in ({"assistant_model": tiny_plain("llama", seed=4)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(write(model, ids, exit_rule=rule, **options), expected)
        assert model.last_exit is not None
        assert torch.equal(model.last_exit, depths)


def test_depths_of_a_continued_text() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    rule = splitting(model)
    whole = write(model, ids, exit_rule=rule)
    depths = model.last_exit
    assert depths is not None
    first = write(model, ids, max_new_tokens=3, exit_rule=rule, return_dict_in_generate=True)
    assert torch.equal(
        write(model, first.sequences, max_new_tokens=5, **{CACHE: first.past_key_values}, exit_rule=rule), whole
    )
    assert model.last_exit is not None
    assert torch.equal(model.last_exit[:, 7:], depths[:, 7:])
    assert model.last_exit[:, :7].eq(0).all(), "positions that an earlier call computed"


def test_beams_with_exits() -> None:
    model, ids = tiny("llama"), tokens(2, 5)
    rule = splitting(model)
    text = write(model, ids, num_beams=3, exit_rule=rule)
    assert torch.equal(write(model, ids, num_beams=3, exit_rule=rule, use_cache=False), text)
    assert model.last_exit is not None
    assert model.last_exit.shape == (6, 5 + NEW - 1)


def test_sampling_with_exits() -> None:
    model, ids, texts = tiny("llama"), tokens(2, 5), []
    for options in ({}, {"use_cache": False}):
        torch.manual_seed(5)
        texts.append(write(model, ids, do_sample=True, exit_rule=splitting(model, "confidence"), **options))
    assert torch.equal(*texts)


def test_an_exit_rule_does_not_outlive_its_call() -> None:
    model, other, ids = tiny("llama"), tiny("llama"), tokens(2, 5)
    expected = model(ids).logits

    class Fails(BaseStreamer):
        def put(self, value: Tensor) -> None:
            raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        write(model, ids[:1], exit_rule=FixedExit(cycles=1), streamer=Fails())
    assert torch.equal(model(ids).logits, expected)
    write(model, ids, exit_rule=ConfidenceExit(threshold=0.0))
    assert other.last_exit is None
    assert torch.equal(model(ids).logits, expected)
