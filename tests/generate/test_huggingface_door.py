"""What comes out of `generate` beside the tokens, what is refused, and what stays as it was."""

import copy
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.generating import NEW, both, ends_of, letters, model_of, prompts_of, spec_for
from tests.fast.cycled import over
from tests.ztt.tiny import VOCABULARY, gap, tiny, tiny_plain, tokens
from zerodraft import LatentExit, ZerodraftError, ZeroMassExit
from zerodraft.generate import door
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.caches import CACHE


class Collector:
    """A streamer that notes what it was given."""

    def __init__(self) -> None:
        self.puts: list[Any] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letters()


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


def test_another_way_of_transformers_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it is called there is not known here, and streamers would be left without a word."""
    door.tell_of_loss.cache_clear()
    monkeypatch.setattr(door, "COLLECTOR", "_another_name")
    model, prompt = tiny_plain("llama"), tokens(1, 7)
    for _ in range(2):
        model.generate(prompt, max_new_tokens=4, custom_generate=spec_for(tokens(1, 30)))
    assert caplog.text.count("has no GenerationMixin._another_name: streamers and stop strings") == 1
    door.tell_of_loss.cache_clear()
    monkeypatch.undo()
    caplog.clear()
    model.generate(prompt, max_new_tokens=4, custom_generate=spec_for(tokens(1, 30)))
    assert not caplog.text


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


@pytest.mark.parametrize("make_target", [None, "auto"])
def test_steps_under_exit_rules_can_be_followed_in_turn(make_target: Any) -> None:
    """Two texts at once, another rule each, by trees of drafts: the tokens and depths of plain decoding alone."""
    model, options = over("llama", cycles=3), {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    prompts, rules = [tokens(1, 9), tokens(1, 6, seed=4)], [LatentExit(threshold=0.55), LatentExit(threshold=0.54)]
    runs, wanted, found = [], [], [([], []) for _ in rules]
    for prompt, rule in zip(prompts, rules, strict=True):
        text = model.generate(prompt, exit_rule=rule, **options)
        wanted.append((text[0, prompt.shape[1] :].tolist(), model.last_exit[0, prompt.shape[1] - 1 :].tolist()))
        spec = spec_for(text, make_target=make_target)
        runs.append(spec.iterate(model, prompt, exit_rule=rule, prefill_chunk_size=4, **options))
    assert all(len(set(depths)) > 1 for _, depths in wanted)
    branched = False
    for steps in zip_longest(*runs):
        for step, (text, depths) in zip(steps, found, strict=True):
            if step is not None and (row := step.rows[0]) is not None:
                text += row.tokens
                depths += row.cycles
                branched |= row.accepted != list(range(len(row.accepted)))
    assert found == wanted
    # else the order of nodes would say nothing
    assert branched


def test_exit_rules_of_steps_are_for_one_text_of_a_looped_model() -> None:
    spec, rule = spec_for(tokens(1, 20)), ZeroMassExit(threshold=0.2)
    with pytest.raises(ZerodraftError, match="exit_rule is for Zero Token Transformers"):
        spec.iterate(tiny_plain("llama"), tokens(1, 7), exit_rule=rule, max_new_tokens=4)
    with pytest.raises(ZerodraftError, match="one text at a time here, but there are 2"):
        next(spec.iterate(tiny("qwen3"), tokens(2, 7), exit_rule=rule, max_new_tokens=4))


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "assistant": ({"assistant_model": "llama"}, "assistant_model"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    "quantized": ({CACHE: None, "cache_implementation": "offloaded"}, "offloaded"),
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
    right = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ZerodraftError, match="on the left"):
        model.generate(tokens(2, 3), attention_mask=right, max_new_tokens=4, custom_generate=spec)


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
