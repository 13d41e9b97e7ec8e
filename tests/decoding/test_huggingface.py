"""`generate(custom_generate=DiffuSpec(...))` gives what `generate` gives: every option on tiny random models."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tests.decoding.drafters import NoisyDrafter
from tests.ztt.tiny import FAMILIES, VOCABULARY, gap, left_padded, tiny, tiny_plain, tokens
from zerodraft import ZerodraftError, ZeroMassExit
from zerodraft.decoding.huggingface import DiffuSpec
from zerodraft.decoding.lengths import AdaptiveLength, CostAwareLength, FixedLength
from zerodraft.decoding.search import SearchConfig
from zerodraft.decoding.target import HfTarget

NEW = 24
MODELS = [*FAMILIES, "ztt"]
KINDS: dict[str, dict[str, Any]] = {
    "path": {"tree": False, "length": FixedLength(5)},
    "tree": {"tree": True, "length": FixedLength(4)},
    "best_first": {"search": SearchConfig(expand="best_first", budget=9), "length": FixedLength(4)},
    "adaptive": {"length": AdaptiveLength(k_min=1, k_max=6)},
    "costs": {"length": CostAwareLength(k_max=6)},
}


def model_of(family: str) -> Any:
    return tiny("qwen3") if family == "ztt" else tiny_plain(family)


def prompts_of(rows: int) -> dict[str, Tensor]:
    if rows == 1:
        return {"input_ids": tokens(1, 7)}
    batch = left_padded([tokens(1, 4 + 3 * (n % 3), seed=n)[0] for n in range(rows)])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def spec_for(answers: Tensor, mask: Tensor | None = None, kind: str = "tree", **noise: Any) -> DiffuSpec:
    """A specification whose drafter knows the answers (padded on the left where the mask says so) but spoils them."""
    starts = [0] * len(answers) if mask is None else (mask == 0).sum(1).tolist()
    texts = [row[start:].tolist() for row, start in zip(answers, starts, strict=True)]
    return DiffuSpec(NoisyDrafter(texts, VOCABULARY, **noise), trace=True, **KINDS[kind])


def both(model: Any, batch: dict[str, Tensor], kind: str = "tree", noise: Any = None, **options: Any) -> tuple:
    """What plain decoding and DiffuSpec return with the same options, and the specification."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    plain = model.generate(**batch, **copy.deepcopy(options))
    answers = plain if isinstance(plain, Tensor) else plain.sequences
    spec = spec_for(answers, batch.get("attention_mask"), kind, **(noise or {}))
    return plain, model.generate(**batch, **options, custom_generate=spec), spec


class Collector:
    """A streamer that notes what it was given."""

    def __init__(self) -> None:
        self.puts: list[Any] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


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


def test_guidance_follows_a_single_text_and_refuses_a_batch() -> None:
    model = tiny_plain("llama")
    negative = tokens(1, 4, seed=9)
    plain, ours, _ = both(model, prompts_of(1), guidance_scale=1.5, negative_prompt_ids=negative)
    assert torch.equal(plain, ours)
    spec = spec_for(tokens(2, 30))
    with pytest.raises(ZerodraftError, match="one by one"):
        model.generate(tokens(2, 7), guidance_scale=1.5, max_new_tokens=4, custom_generate=spec)


# -- where texts end ----------------------------------------------------------------------------------------------


def ends_of(model: Any, batch: dict[str, Tensor], at: Sequence[int]) -> list[int]:
    """Tokens that occur in the plain outputs at these places: good EOS ids."""
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    width = batch["input_ids"].shape[1]
    return [int(plain[row % len(plain), width + place]) for row, place in enumerate(at)]


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
    """One printable character for each id."""
    letters = Tokenizer(BPE(vocab={chr(33 + i): i for i in range(VOCABULARY)}, merges=[]))
    letters.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, clean_up_tokenization_spaces=False)


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


# -- streaming and what is returned -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("eos", [True, False])
def test_a_streamer_gets_what_plain_decoding_gives_it(rows: int, eos: bool) -> None:
    model, batch = tiny_plain("llama"), prompts_of(rows)
    ids = ends_of(model, batch, [11, 5, 8]) if eos else None
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=ids)
    streams = [Collector(), Collector()]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ids}
    model.generate(**batch, streamer=streams[0], **options)
    spec = spec_for(plain, batch.get("attention_mask"))
    model.generate(**batch, streamer=streams[1], custom_generate=spec, **options)
    assert streams[0].puts == streams[1].puts
    assert streams[0].ends == streams[1].ends == 1


def test_a_text_streamer_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    model.generate(prompt, max_new_tokens=NEW, do_sample=False, streamer=streamer, custom_generate=spec_for(plain))
    assert "".join(streamer) == tokenizer.decode(plain[0, 7:])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_scores_and_logits_are_returned(rows: int, penalty: float) -> None:
    model, batch = tiny_plain("llama"), prompts_of(rows)
    plain, ours, _ = both(
        model,
        batch,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=penalty,
        eos_token_id=None,
    )
    assert torch.equal(plain.sequences, ours.sequences)
    for name in ("scores", "logits"):
        a, b = getattr(plain, name), getattr(ours, name)
        assert len(a) == len(b) == NEW
        assert gap(torch.stack(a), torch.stack(b)) < 2e-5
    assert (
        gap(
            model.compute_transition_scores(plain.sequences, plain.scores),
            model.compute_transition_scores(ours.sequences, ours.scores),
        )
        < 2e-5
    )


def test_rows_that_ended_have_zero_scores() -> None:
    model, batch = tiny_plain("llama"), prompts_of(3)
    eos = ends_of(model, batch, [11, 5, 8])
    options = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": eos}
    plain, ours, _ = both(model, batch, **options)
    assert len(plain.scores) == len(ours.scores)
    width = batch["input_ids"].shape[1]
    for at, (a, b) in enumerate(zip(plain.scores, ours.scores, strict=True)):
        for row in range(3):
            ended = any(int(t) in eos for t in plain.sequences[row, width : width + at])
            assert (b[row] == 0).all() if ended else gap(a[row], b[row]) < 2e-5


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
    ours = model.generate(prompt, max_new_tokens=NEW, past_key_values=cache, custom_generate=spec, **options)
    assert torch.equal(plain, ours)
    assert cache.get_seq_length() == length - 1
    onward = model.generate(ours, max_new_tokens=5, past_key_values=cache, **options)
    assert torch.equal(onward, model.generate(plain, max_new_tokens=5, **options))
    again = spec_for(plain)
    with pytest.raises(ZerodraftError, match="already holds"):
        model.generate(onward, max_new_tokens=5, past_key_values=cache, custom_generate=again, **options)


def test_steps_can_be_followed() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    spec, stream = spec_for(plain), Collector()
    text = prompt[0].tolist()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for number, step in enumerate(spec.iterate(model, prompt, streamer=stream, **options)):
        row = step.rows[0]
        assert row is not None
        assert row.tokens == [row.drafted[node] for node in row.accepted] + [row.own]
        text += row.tokens
        assert spec.last_stats.steps == number
        assert stream.puts[1:] == [[token] for token in text[7:]]
    assert text == plain[0].tolist()
    assert torch.equal(spec.last_result, plain)
    assert spec.last_stats.trace[0].rows[0].drafted == []
    with pytest.raises(ZerodraftError, match="exit_rule"):
        spec.iterate(tiny("qwen3"), prompt, exit_rule=ZeroMassExit(threshold=0.2))


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


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "assistant": ({"assistant_model": "llama"}, "assistant_model"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    "quantized": ({"past_key_values": None, "cache_implementation": "offloaded"}, "offloaded"),
    "positions": ({"position_ids": torch.arange(7)[None] + 3}, "position_ids"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 7, 32)}, "inputs_embeds|empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_clear_error(name: str) -> None:
    options, message = copy.deepcopy(REFUSED[name])
    if "assistant_model" in options:
        options["assistant_model"] = tiny_plain("llama")
    model = tiny_plain("llama")
    prompt = {} if "inputs_embeds" in options else {"input_ids": tokens(1, 7)}
    with pytest.raises(ZerodraftError, match=message):
        model.generate(**prompt, max_new_tokens=4, custom_generate=spec_for(tokens(1, 30)), **options)


def test_encoder_decoder_models_are_refused() -> None:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    ffn = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
    config = BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes, **heads, **ffn)
    model = BartForConditionalGeneration(config).eval()
    with pytest.raises(ZerodraftError, match="encoder-decoder"):
        model.generate(tokens(1, 7), max_new_tokens=4, num_beams=1, custom_generate=spec_for(tokens(1, 30)))


def test_prompts_that_cannot_be_read() -> None:
    model, spec = tiny_plain("llama"), spec_for(tokens(2, 30))
    with pytest.raises(ZerodraftError, match=r"129 tokens.*128"):
        model.generate(tokens(1, 129), max_new_tokens=4, custom_generate=spec)
    with pytest.raises(ZerodraftError, match="empty"):
        model.generate(tokens(1, 0), max_new_tokens=4, custom_generate=spec)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ZerodraftError, match="empty"):
        model.generate(tokens(2, 3), attention_mask=mask, max_new_tokens=4, custom_generate=spec)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_drafts_stay_inside_the_context_window(family: str) -> None:
    model, prompt = tiny_plain(family), tokens(1, 118)
    plain, ours, _ = both(model, {"input_ids": prompt}, max_new_tokens=11, eos_token_id=None)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.2}])
def test_logits_that_are_no_numbers(value: float, options: dict[str, Any]) -> None:
    model = tiny_plain("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(ZerodraftError, match="NaN"):
        model.generate(tokens(1, 7), max_new_tokens=4, custom_generate=spec_for(tokens(1, 30)), **options)


def test_a_drafter_that_does_not_fit_is_asked_first() -> None:
    class Misfit(NoisyDrafter):
        def check(self, config: Any) -> None:
            raise ZerodraftError(f"This drafter is for 99 tokens, the target has {config.vocab_size}.")

    with pytest.raises(ZerodraftError, match="target has 64"):
        tiny_plain("llama").generate(
            tokens(1, 7), max_new_tokens=4, custom_generate=DiffuSpec(Misfit([[]], VOCABULARY))
        )


# -- nothing of the caller's changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "ztt"])
def test_the_model_and_the_options_stay_as_they_were(family: str) -> None:
    model, prompt = model_of(family), tokens(1, 7)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=[2], pad_token_id=0)
    processors, criteria = LogitsProcessorList(), StoppingCriteriaList()

    def picture() -> Any:
        modules = {name: sorted(vars(module)) for name, module in model.named_modules()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        settings = (model.config.to_dict(), model.generation_config.to_dict(), config.to_dict())
        return modules, hooks, copy.deepcopy(settings), model.training, type(model).forward, len(processors)

    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.generate(prompt, max_new_tokens=2, do_sample=False)  # what transformers itself notes down
    before = picture()
    plain = model.generate(prompt, generation_config=config)
    given = prompt.clone()
    model.generate(
        prompt,
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=criteria,
        custom_generate=spec_for(plain),
    )
    assert picture() == before
    assert torch.equal(prompt, given)
    assert len(criteria) == 0
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


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
