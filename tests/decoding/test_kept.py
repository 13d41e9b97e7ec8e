"""Turns of a conversation: what earlier ones computed is used again, and every token is what it is without."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.generating import model_of
from tests.decoding.test_together import DRAFTERS
from tests.drafters.test_block import make
from tests.fast.test_graphed import Unrecorded
from tests.ztt.tiny import VOCABULARY, randomise, tiny, tiny_plain, tokens
from zerodraft import ContextProxy, DiffuSpec, FixedExit, FixedLength
from zerodraft.decoding.kept import KeptTexts, common_prefix
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.none import NoDrafter
from zerodraft.fast.graphed import graphed_target
from zerodraft.fast.lean import lean_target
from zerodraft.models.caches import CACHE

NEW, TURN = 9, 5
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TARGETS: dict[str, Any] = {
    "auto": "auto",
    "model": None,
    "graphed": lambda model: graphed_target(model, recorder=Unrecorded),
}


def turns(model: Any, spec: Any, count: int = 4, **more: Any) -> list[tuple[Tensor, int, int]]:
    """A conversation: of each turn the whole text, the prompt's tokens, and how many of them were used again."""
    text, found = tokens(1, 7), []
    for turn in range(count):
        prompt = text.shape[1]
        text = model.generate(text, **OPTIONS, custom_generate=spec, **more)
        stats = spec.last_stats
        found.append((text, stats.prompt_tokens, stats.reused_tokens))
        assert stats.prompt_tokens == prompt
        text = torch.cat([text, tokens(1, TURN, seed=10 + turn) % VOCABULARY], 1)
    return found


def plainly(model: Any, texts: list[Tensor], **more: Any) -> list[Tensor]:
    return [model.generate(text[:, :-NEW], **OPTIONS, **more) for text in texts]


def drafter_of(name: str) -> Any:
    return {"noisy": NoisyDrafter([[]], VOCABULARY), "lookup": PromptLookupDrafter(), "none": NoDrafter()}[name]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("drafter", ["noisy", "lookup", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "ztt"])  # where nothing is recorded: as "model"
def test_later_turns_read_what_is_new_alone(family: str, drafter: str, target: str) -> None:
    model = model_of(family)
    spec = DiffuSpec(drafter_of(drafter), length=FixedLength(4), make_target=TARGETS[target], reuse=True)
    found = turns(model, spec)
    texts = [text for text, _, _ in found]
    assert all(map(torch.equal, texts, plainly(model, texts)))
    # the last token of a text has not been through the model
    assert [prompt - reused for _, prompt, reused in found] == [7, *[TURN + 1] * 3]


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_know_what_they_knew(name: str, make_target: Any) -> None:
    """Turns with a drafter that goes on draft exactly what one would that has read everything anew."""
    model, block = make("llama")
    specs = [
        DiffuSpec(DRAFTERS[name](model, block), length=FixedLength(4), make_target=make_target, trace=True, reuse=reuse)
        for reuse in (True, False)
    ]
    text = torch.tensor([[3, 20, 3, 20, 7, 3, 5]])
    for turn in range(3):
        kept, anew = (model.generate(text, **OPTIONS, custom_generate=spec) for spec in specs)
        assert torch.equal(kept, anew)
        assert torch.equal(kept, model.generate(text, **OPTIONS))
        ours, theirs = (spec.last_stats for spec in specs)
        assert ours is not None
        assert theirs is not None
        assert (ours.reused_tokens > 0) == (turn > 0)
        if name != "hybrid":  # which trusts its copies as far as they were right before
            assert ours.drafted == theirs.drafted
            assert [step.rows for step in ours.trace or ()] == [step.rows for step in theirs.trace or ()]
        # the next turn changes the answer's end, as a template may
        text = torch.cat([kept[:, : -3 - 2 * turn], torch.tensor([[3, 20, 3]])], 1)


@pytest.mark.parametrize("make_target", ["auto", None])
def test_texts_part_where_they_part(make_target: Any) -> None:
    """Another conversation, one that ends before the last one, the same one again, a longer one."""
    model = tiny_plain("llama")
    spec = DiffuSpec(drafter_of("noisy"), length=FixedLength(3), make_target=make_target, reuse=True)
    base = tokens(1, 12)
    other = (base + 1) % VOCABULARY
    for prompt, reused in (
        (base, 0),
        (base, 11),
        (base[:, :5], 4),
        (torch.cat([base[:, :3], other], 1), 3),
        (torch.cat([base[:, :3], other], 1), 14),
        (other, 0),
        (base, 0),
        (base[:, :1], 0),
    ):
        text = model.generate(prompt, **OPTIONS, custom_generate=spec)
        assert torch.equal(text, model.generate(prompt, **OPTIONS))
        assert spec.last_stats is not None
        assert spec.last_stats.reused_tokens == reused


def test_a_proxy_is_told_the_whole_text() -> None:
    model = tiny_plain("llama")
    told: list[list[int]] = []

    class Listening(ContextProxy):
        def start(self) -> Any:
            session: Any = super().start()
            told.append([])
            observe = session.observe

            def listen(ids: list[int]) -> None:
                told[-1].extend(ids)
                observe(ids)

            session.observe = listen
            return session

    spec = DiffuSpec(drafter_of("noisy"), length=FixedLength(3), proxy=Listening(VOCABULARY), reuse=True)
    texts = [text[0].tolist() for text, _, _ in turns(model, spec, 3)]
    assert told == texts


CHANGES: dict[str, Callable[[Any, DiffuSpec], None]] = {
    "weights": lambda model, spec: randomise(model, seed=5),
    "weights, without a version": lambda model, spec: model.lm_head.weight.data.mul_(0.5),
    "another drafter": lambda model, spec: setattr(spec, "drafter", drafter_of("lookup")),
    "another target": lambda model, spec: setattr(spec, "make_target", None),
    "forgotten": lambda model, spec: spec.forget(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_read_anew(name: str) -> None:
    model = tiny_plain("llama")
    spec = DiffuSpec(drafter_of("noisy"), length=FixedLength(3), reuse=True)
    turns(model, spec, 2)
    CHANGES[name](model, spec)
    text, _, reused = turns(model, spec, 1)[0]
    assert reused == 0
    assert torch.equal(text, *plainly(model, [text]))
    assert turns(model, spec, 2)[1][2] > 0


def test_other_models_have_other_keys() -> None:
    spec = DiffuSpec(NoDrafter(), length=FixedLength(0), reuse=True)
    for seed in (0, 1, 0):
        model = tiny_plain("llama", seed=seed)
        text, _, reused = turns(model, spec, 1)[0]
        assert reused == 0
        assert torch.equal(text, *plainly(model, [text]))


def test_exit_rules_read_everything() -> None:
    """What a cache holds depends on the rule, and the depth of every token is told."""
    model = tiny("qwen3")
    spec = DiffuSpec(drafter_of("noisy"), length=FixedLength(3), make_target=None, reuse=True)
    rule = {"exit_rule": FixedExit(cycles=1)}
    turns(model, spec, 2)
    found = turns(model, spec, 3, **rule)
    texts = [text for text, _, _ in found]
    assert [reused for _, _, reused in found] == [0, 0, 0]
    assert all(map(torch.equal, texts, plainly(model, texts, **rule)))
    assert model.last_exit is not None
    assert model.last_exit.shape[1] == texts[-1].shape[1] - 1


ASIDE: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "rows": lambda model, text: {"input_ids": text.expand(2, -1)},
    "padding": lambda model, text: {
        "input_ids": text,
        "attention_mask": (torch.arange(text.shape[1]) > 1)[None].long(),
    },
    "static": lambda model, text: {"input_ids": text, "cache_implementation": "static"},
}


@pytest.mark.parametrize("name", ASIDE)
def test_what_reuse_is_not_for_is_read_anew(name: str) -> None:
    model, text = tiny_plain("llama"), tokens(1, 8)
    spec = DiffuSpec(PromptLookupDrafter(), length=FixedLength(3), reuse=True)
    model.generate(text, **OPTIONS, custom_generate=spec)
    batch = ASIDE[name](model, text)
    ours = model.generate(**batch, **OPTIONS, custom_generate=spec)
    assert torch.equal(ours, model.generate(**ASIDE[name](model, text), **OPTIONS))
    assert spec.last_stats is not None
    assert spec.last_stats.reused_tokens == 0


def test_frequencies_that_depend_on_the_length_are_computed_anew() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_plain("llama", rope_parameters=rope, max_position_embeddings=24)
    spec = DiffuSpec(NoDrafter(), length=FixedLength(0), reuse=True)
    model.generate(tokens(1, 8), **OPTIONS, custom_generate=spec)
    model.generate(tokens(1, 8), **OPTIONS, custom_generate=spec)
    assert spec.last_stats is not None
    assert spec.last_stats.reused_tokens == 0


@pytest.mark.parametrize("make_target", ["auto", None])
def test_an_empty_cache_of_the_caller_is_filled(make_target: Any) -> None:
    model = tiny_plain("llama")
    spec = DiffuSpec(drafter_of("noisy"), length=FixedLength(3), make_target=make_target, reuse=True)
    texts = [text for text, _, _ in turns(model, spec, 2)]
    cache = DynamicCache(config=model.config)
    whole = model.generate(texts[1][:, :-NEW], **OPTIONS, **{CACHE: cache}, custom_generate=spec)
    assert spec.last_stats is not None
    assert spec.last_stats.reused_tokens == texts[1].shape[1] - NEW - 1
    assert cache.get_seq_length() == whole.shape[1] - 1
    onward = model.generate(whole, **OPTIONS, **{CACHE: cache})
    assert torch.equal(onward, model.generate(whole, **OPTIONS))


def test_a_cache_of_the_caller_counts_as_used_again() -> None:
    model, text = tiny_plain("llama"), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    spec = DiffuSpec(PromptLookupDrafter())
    text = model.generate(text, **OPTIONS, **{CACHE: cache}, custom_generate=spec)
    model.generate(text, **OPTIONS, **{CACHE: cache}, custom_generate=spec)
    assert spec.last_stats is not None
    assert spec.last_stats.reused_tokens == text.shape[1] - 1


def test_a_text_that_is_given_up_leaves_what_it_was() -> None:
    model, text = tiny_plain("llama"), tokens(1, 8)
    spec = DiffuSpec(NoDrafter(), length=FixedLength(0), reuse=True)
    steps = spec.iterate(model, text, **OPTIONS)
    next(steps)
    next(steps)
    steps.close()
    found = model.generate(text, **OPTIONS, custom_generate=spec)
    assert torch.equal(found, model.generate(text, **OPTIONS))
    assert spec.last_stats is not None
    assert spec.last_stats.reused_tokens == 7
    # of a prompt that was not read to its end nobody was told
    steps = spec.iterate(model, text + 1, **OPTIONS, prefill_chunk_size=3)
    assert next(steps).rows == [None]
    steps.close()
    found = model.generate(text + 1, **OPTIONS, custom_generate=spec)
    assert torch.equal(found, model.generate(text + 1, **OPTIONS))
    assert spec.last_stats.reused_tokens == 0


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize("name", DRAFTERS)
def test_prompts_are_read_in_pieces(name: str, make_target: Any) -> None:
    model, block = make("llama")
    spec = DiffuSpec(DRAFTERS[name](model, block), length=FixedLength(4), make_target=make_target, reuse=True)
    text = torch.tensor([[3, 20, 3, 20, 7, 3, 5, 9, 3, 20]])
    for pieces in (4, 2):
        plain = model.generate(text, **OPTIONS)
        steps = list(spec.iterate(model, text, **OPTIONS, prefill_chunk_size=3))
        assert [step.rows for step in steps[: pieces - 1]] == [[None]] * (pieces - 1)
        assert steps[pieces - 1].rows[0] is not None
        assert torch.equal(spec.last_result, plain)
        # the next turn has four tokens that are not known yet
        text = torch.cat([plain, torch.tensor([[3, 20, 3]])], 1)


def conversations(spec: DiffuSpec, model: Any, order: str) -> list[int]:
    """Turns of conversations that begin alike, by their letters; how many tokens each used again."""
    texts: dict[str, Tensor] = {}
    reused = []
    for name in order:
        start = torch.cat([tokens(1, 4), tokens(1, 9, seed=ord(name)) % VOCABULARY], 1)
        text = torch.cat([texts[name], tokens(1, TURN)], 1) if name in texts else start
        texts[name] = model.generate(text, **OPTIONS, custom_generate=spec)
        assert torch.equal(texts[name], model.generate(text, **OPTIONS))
        assert spec.last_stats is not None
        reused.append(spec.last_stats.reused_tokens)
    return reused


@pytest.mark.parametrize("make_target", ["auto", None])
def test_several_conversations_go_on(make_target: Any) -> None:
    model = tiny_plain("llama")

    def spec(reuse: KeptTexts) -> DiffuSpec:
        return DiffuSpec(drafter_of("noisy"), length=FixedLength(3), make_target=make_target, reuse=reuse)

    first, second = 13 + NEW - 1, 13 + NEW + TURN + NEW - 1
    everything = KeptTexts()
    # the four tokens that all begin with are not worth the rest of another conversation
    assert conversations(spec(everything), model, "abcabcab") == [0, 0, 0, *[first] * 3, *[second] * 2]
    assert len(everything) == 3
    two = KeptTexts(texts=2)
    assert conversations(spec(two), model, "abacab") == [0, 0, first, 0, second, 0]
    assert len(two) == 2
    one = KeptTexts()
    conversations(spec(one), model, "a")
    little = KeptTexts(mib=2.5 * one.nbytes / 2**20)
    assert conversations(spec(little), model, "abcca") == [0, 0, 0, first, 0]
    assert 0 < little.nbytes <= little.mib * 2**20
    nothing = KeptTexts(mib=0)
    assert conversations(spec(nothing), model, "aa") == [0, 0]
    everything.clear()
    assert everything.nbytes == 0


def test_a_decoder_with_its_own_seed_shares_what_is_kept() -> None:
    model = tiny_plain("llama")
    spec = DiffuSpec(drafter_of("lookup"), length=FixedLength(3), reuse=KeptTexts())
    options = OPTIONS | {"do_sample": True, "temperature": 1.5}
    text, other = tokens(1, 9), tokens(1, 9, seed=3)
    alone = [spec.seeded(5).generate(model, text, **options) for _ in range(2)]
    assert torch.equal(*alone)
    # in company, step by step
    mine, theirs = spec.seeded(5), spec.seeded(6)
    steps = [mine.iterate(model, text, **options), theirs.iterate(model, other, **options)]
    while [step for step in [next(run, None) for run in steps] if step]:
        pass
    assert torch.equal(mine.last_result, alone[0])
    assert not torch.equal(spec.seeded(7).generate(model, text, **options), alone[0])
    assert mine.last_stats is not None
    assert mine.last_stats.reused_tokens == 8


def test_threads_take_it_by_turns() -> None:
    model = tiny_plain("llama")
    spec = DiffuSpec(PromptLookupDrafter(), length=FixedLength(3), reuse=True)
    prompts = [torch.cat([tokens(1, 6), tokens(1, 4, seed=n % 3)], 1) for n in range(12)]
    right = [model.generate(prompt, **OPTIONS) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda prompt: model.generate(prompt, **OPTIONS, custom_generate=spec), prompts))
    assert all(map(torch.equal, answers, right))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_copies_begin_with_nothing_kept(copied: Callable[[DiffuSpec], DiffuSpec]) -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 10)
    spec = DiffuSpec(PromptLookupDrafter(), length=FixedLength(3), reuse=KeptTexts(mib=5, texts=2))
    right = model.generate(prompt, **OPTIONS)
    for other in (spec, copied(spec)):
        assert torch.equal(model.generate(prompt, **OPTIONS, custom_generate=other), right)
        assert other.last_stats is not None
        assert other.last_stats.reused_tokens == 0
        assert (other._kept.mib, other._kept.texts, len(other._kept)) == (5, 2, 1)


def test_a_long_conversation_grows_every_buffer() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    assert lean_target(model) is not None
    spec = DiffuSpec(PromptLookupDrafter(), length=FixedLength(3), reuse=True)
    text = tokens(1, 200)
    for turn in range(4):
        text = torch.cat([text, tokens(1, 150, seed=turn)], 1)
        text = model.generate(text, **OPTIONS, custom_generate=spec)
        assert torch.equal(text, model.generate(text[:, :-NEW], **OPTIONS))


def test_the_common_beginning() -> None:
    a = torch.tensor([1, 2, 3, 4])
    assert common_prefix(a, a) == 4
    assert common_prefix(a, torch.tensor([1, 2, 9, 4, 5])) == 2
    assert common_prefix(a[:2], a) == 2
    assert common_prefix(a[:0], a) == 0
