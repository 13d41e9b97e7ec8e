"""`generate(custom_generate=DiffuSpec(...))` writes what `generate` writes, whatever the options, on tiny models."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.generating import KINDS, MODELS, NEW, both, ends_of, letters, model_of, prompts_of, spec_for
from tests.ztt.tiny import VOCABULARY, gap, tiny, tiny_plain, tokens
from zerodraft import ZeroMassExit
from zerodraft.fast.target import HfTarget
from zerodraft.generate.huggingface import DiffuSpec

# -- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_greedy_tokens_are_those_of_generate(family: str, kind: str) -> None:
    plain, ours, spec = both(model_of(family), prompts_of(1), kind, eos_token_id=None)
    assert torch.equal(plain, ours)
    stats = spec.last_stats
    assert stats is not None
    assert stats.new_tokens == NEW
    assert stats.accepted > 3
    assert stats.steps < NEW - 1


@pytest.mark.parametrize("kind", ["path", "tree"])
@pytest.mark.parametrize("family", MODELS)
def test_rows_of_a_batch_have_the_tokens_of_generate(family: str, kind: str) -> None:
    model, batch = model_of(family), prompts_of(3)
    plain, ours, spec = both(model, batch, kind, eos_token_id=None)
    assert torch.equal(plain, ours)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        real = ids[mask.bool()][None]
        single = model.generate(real, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(single[0, real.shape[1] :], ours[row, ids.shape[0] :])
    counts = {tuple(len(r.tokens) for r in step.rows if r) for step in spec.last_stats.trace}
    assert any(len(set(count)) > 1 for count in counts)


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_any_pattern_of_acceptance_is_exact(seed: int, right: float) -> None:
    noise = {"seed": seed, "right": right, "short": seed % 2 == 0}
    for rows in (1, 4):
        plain, ours, _ = both(tiny_plain("gemma3"), prompts_of(rows), "tree", noise, eos_token_id=None)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_that_take_masks(attention: str) -> None:
    model = tiny_plain("mistral")
    model.set_attn_implementation(attention)
    plain, ours, _ = both(model, prompts_of(2), eos_token_id=None)
    assert torch.equal(plain, ours)


def test_a_zero_token_transformer_with_early_exit_is_a_target() -> None:
    plain, ours, _ = both(tiny("qwen3"), prompts_of(1), exit_rule=ZeroMassExit(threshold=0.2), eos_token_id=None)
    assert torch.equal(plain, ours)


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[28], [32, 17]]},
    "bias": {"sequence_bias": [[[28], -4.0], [[5, 6], 9.0]]},
    "suppressed": {"suppress_tokens": [28, 32], "begin_suppress_tokens": [21]},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 2},
    "decay": {"exponential_decay_length_penalty": (5, 1.5)},
    "prompt": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [3 + (len(ids) + row) % 40, 50, 51 + row]},
    "renormalised": {"renormalize_logits": True, "remove_invalid_values": True},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_see_each_token_s_own_text(name: str, rows: int) -> None:
    plain, ours, spec = both(tiny_plain("llama"), prompts_of(rows), **PROCESSORS[name])
    assert torch.equal(plain, ours)
    assert spec.last_stats.accepted > 0


class Counting(LogitsProcessor):
    """A processor with a memory: the n-th call forbids token n."""

    def __init__(self) -> None:
        self.texts: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.texts.append(input_ids.tolist())
        scores[:, len(self.texts) % VOCABULARY] = -torch.inf
        scores[:, 28] -= 3
        return scores


def test_a_processor_with_a_memory_is_called_as_in_plain_decoding() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    calls = [Counting(), Counting()]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt, logits_processor=LogitsProcessorList([calls[0]]), **options)
    ours = model.generate(
        prompt, logits_processor=LogitsProcessorList([calls[1]]), custom_generate=spec_for(plain), **options
    )
    assert torch.equal(plain, ours)
    assert calls[0].texts == calls[1].texts


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_follows_each_text(rows: int) -> None:
    """transformers' processor remembers a cache of the whole batch."""
    negative = tokens(rows, 4, seed=9)
    plain, ours, spec = both(
        tiny_plain("llama"), prompts_of(rows), guidance_scale=1.5, negative_prompt_ids=negative, eos_token_id=None
    )
    assert torch.equal(plain, ours)
    assert spec.last_stats.accepted > 0


# -- where texts end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["path", "tree", "adaptive"])
def test_several_eos_tokens_and_padding(rows: int, kind: str) -> None:
    model, batch = tiny_plain("qwen2"), prompts_of(rows)
    for places in ([3], [9, 6, 14], [0, 20]):
        eos = ends_of(model, batch, places)
        plain, ours, _ = both(model, batch, kind, eos_token_id=eos, pad_token_id=0)
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("new", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 3])
def test_length_limits(new: int, rows: int) -> None:
    model, batch = tiny_plain("llama"), prompts_of(rows)
    eos = ends_of(model, batch, [1, 2, 1])
    for options in (
        {"max_new_tokens": new},
        {"max_new_tokens": None, "max_length": batch["input_ids"].shape[1] + new},
        {"max_new_tokens": 7, "min_new_tokens": new, "eos_token_id": eos},
        {"max_new_tokens": 7, "min_length": batch["input_ids"].shape[1] + new, "eos_token_id": eos},
    ):
        plain, ours, _ = both(model, batch, noise={"right": 1.0}, **options)
        assert torch.equal(plain, ours)


def test_the_default_length_is_that_of_generate() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 5)
    with pytest.warns(UserWarning, match="max_length"):
        plain = model.generate(prompt, do_sample=False, eos_token_id=None)
    with pytest.warns(UserWarning, match="max_length"):
        ours = model.generate(prompt, do_sample=False, eos_token_id=None, custom_generate=spec_for(plain))
    assert torch.equal(plain, ours)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letters()


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    model, batch = tiny_plain("llama"), prompts_of(rows)
    for places in ([8], [2, 13, 5]):
        strings = [tokenizer.decode([token]) for token in ends_of(model, batch, places)]
        options = {"stop_strings": strings, "tokenizer": tokenizer, "eos_token_id": 2, "pad_token_id": 0}
        plain, ours, _ = both(model, batch, **options)
        assert len(strings) < rows or plain.shape[1] < batch["input_ids"].shape[1] + NEW
        assert torch.equal(plain, ours)


class StopAt(StoppingCriteria):
    """Stops rows one after the other, and notes what it saw."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = torch.tensor(lengths)
        self.scores: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.scores.append(0 if scores is None else len(scores))
        assert scores is None or scores[-1].shape[0] == len(input_ids)
        return self.lengths <= input_ids.shape[1]


@pytest.mark.parametrize("eos", [None, 2])
def test_stopping_criteria_of_one_s_own(eos: int | None) -> None:
    model = tiny_plain("llama")
    for rows, lengths in ((1, [15]), (3, [14, 21, 12])):
        batch = prompts_of(rows)
        width = batch["input_ids"].shape[1]
        criteria = StoppingCriteriaList([StopAt([width + n - 7 for n in lengths])])
        plain, ours, _ = both(model, batch, stopping_criteria=criteria, eos_token_id=eos)
        assert plain.shape[1] == width + max(lengths) - 7
        assert torch.equal(plain, ours)


def test_stopping_criteria_get_the_scores() -> None:
    model, batch = tiny_plain("llama"), prompts_of(1)
    criterion = StopAt([100])
    both(
        model,
        batch,
        stopping_criteria=StoppingCriteriaList([criterion]),
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
    )
    # the copy that plain decoding used is another one
    assert criterion.scores == list(range(1, NEW + 1))


@pytest.mark.parametrize("rows", [1, 3])
def test_time_is_up(rows: int) -> None:
    batch = prompts_of(rows)
    model, answers = tiny_plain("llama"), torch.cat([batch["input_ids"], tokens(rows, 60)], 1)
    spec = spec_for(answers, batch.get("attention_mask"))
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "custom_generate": spec}
    out = model.generate(**batch, max_time=1e-9, **options)
    assert out.shape[1] == batch["input_ids"].shape[1] + 1
    late = StoppingCriteriaList([MaxTimeCriteria(3600.0)])
    assert model.generate(**batch, stopping_criteria=late, **options).shape[1] == batch["input_ids"].shape[1] + 60


# -- sampling through generate ------------------------------------------------------------------------------------


def test_sampling_is_repeatable_and_expands_rows() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None, "num_return_sequences": 3}
    outs = []
    for seed in (1, 1, 2):
        drafter = NoisyDrafter(tokens(3, 20).tolist(), VOCABULARY)
        spec = DiffuSpec(drafter, generator=torch.Generator().manual_seed(seed))
        outs.append(model.generate(prompt, custom_generate=spec, **options))
    assert outs[0].shape == (3, 15)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0], outs[0][1])


# -- another target -----------------------------------------------------------------------------------------------


def test_another_target_can_be_plugged_in() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    made = []

    def make(model: Any) -> HfTarget:
        made.append(HfTarget(model))
        return made[-1]

    for make_target in (make, lambda model: None):
        drafter = NoisyDrafter(plain.tolist(), VOCABULARY)
        spec = DiffuSpec(drafter, make_target=make_target)
        assert torch.equal(plain, model.generate(prompt, max_new_tokens=NEW, do_sample=False, custom_generate=spec))
    assert len(made) == 1


class Bare:
    """A target that can do no more than it has to."""

    def __init__(self, model: Any) -> None:
        target = HfTarget(model)
        self.device, self.prefill, self.score, self.keep = target.device, target.prefill, target.score, target.keep


@pytest.mark.parametrize("make_target", [HfTarget, Bare])
def test_a_target_that_can_export_returns_a_cache(make_target: Any) -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(prompt, **how)
    spec = DiffuSpec(NoisyDrafter(plain.sequences.tolist(), VOCABULARY), make_target=make_target)
    out = model.generate(prompt, **how, custom_generate=spec)
    assert torch.equal(out.sequences, plain.sequences)
    lengths = None if out.past_key_values is None else out.past_key_values.get_seq_length()
    assert lengths == (None if make_target is Bare else plain.past_key_values.get_seq_length())


def test_taps_arrive_one_position_behind_the_tokens() -> None:
    model, batch = tiny_plain("llama"), prompts_of(3)
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    spec = spec_for(plain, batch["attention_mask"])
    spec.drafter.taps = (0, 2)
    model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None, custom_generate=spec)
    for row, mask in enumerate(batch["attention_mask"]):
        news = [step[row] for step in spec.drafter.log]
        seen = torch.cat([n.tokens for n in news])
        taps = torch.cat([n.taps for n in news])
        answer = plain[row][int((mask == 0).sum()) :]
        assert len(taps) == len(seen) - 1
        assert torch.equal(seen, answer[: len(seen)])
        with torch.no_grad():
            hidden = model(seen[None], output_hidden_states=True).hidden_states
        assert gap(taps, torch.stack([hidden[0][0, :-1], hidden[2][0, :-1]], 1)) < 2e-5
