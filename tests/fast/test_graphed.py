"""Recorded passes compute what the model's own forward pass computes: unrecorded, and on a tape."""

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, MixtralConfig, MixtralForCausalLM

from tests.decoding.generating import MODELS, both, spec_for
from tests.fast.altered import with_adapter, with_hook, with_other_forward
from tests.fast.tape import Taped
from tests.fast.test_target import EMPTY, PATH, TREE, check, plain, score
from tests.ztt.tiny import LAYERS, SIZES, gap, left_padded, tiny, tiny_plain, tokens
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.fast import best, graphed, recorded
from zerodraft.fast.best import best_target
from zerodraft.fast.graphed import GraphedTarget, graphed_target, release_graphs
from zerodraft.fast.lean import LeanTarget
from zerodraft.fast.recorded import RecordingError
from zerodraft.fast.target import HfTarget
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.caches import CACHE
from zerodraft.models.resolve import resolve

FAMILIES = [family for family in MODELS if family != "ztt"]


class Unrecorded:
    """A recorder that lets passes run as they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Any) -> Any:
        return run


def target_of(model: Any, recorder: Any = Unrecorded) -> GraphedTarget:
    target = graphed_target(model, recorder=recorder)
    assert target is not None
    return target


@pytest.mark.parametrize("recorder", [Unrecorded, Taped])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_has_the_logits_of_its_own_text(family: str, attention: str, recorder: Any) -> None:
    model = tiny_plain(family)
    model.set_attn_implementation(attention)
    taps = (0, 2, LAYERS)
    target, usual, prompt = target_of(model, recorder), HfTarget(model), tokens(1, 9)
    with torch.no_grad():
        for each in (target, usual):
            each.prefill(prompt, prompt >= 0, taps)
    text = prompt[0].tolist()
    # accepted: a part of a branch, nothing, a whole path, the plain step of an empty draft, a branch again
    for tree, kept in ((TREE, [0, 4]), (TREE, []), (PATH, [0, 1, 2]), (EMPTY, []), (TREE, [6, 7]), (TREE, [1, 2])):
        text.append(20 + len(text))
        out, expected = (score(each, text[-1:], [tree], taps) for each in (target, usual))
        check(model, out, 0, text, tree, taps)
        assert gap(out.logits, expected.logits) < 2e-5
        assert gap(out.taps, expected.taps) < 2e-5
        for each in (target, usual):
            each.keep([[0, *(node + 1 for node in kept)]])
        text += [int(tree.tokens[node]) for node in kept]


@pytest.mark.parametrize("recorder", [Unrecorded, Taped])
@pytest.mark.parametrize("kind", ["path", "tree", "best_first"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_generate_writes_the_same_text(family: str, kind: str, recorder: Any) -> None:
    model = tiny_plain(family)
    for prompt in (tokens(1, 7), tokens(1, 12, seed=4)):
        answer, usual, spec = both(model, {"input_ids": prompt}, kind, eos_token_id=None)
        assert torch.equal(answer, usual)
        spec.make_target = lambda model: target_of(model, recorder)
        ours = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, custom_generate=spec)
        assert torch.equal(answer, ours)
        assert spec.last_stats.accepted > 3


@pytest.mark.parametrize("recorder", [Unrecorded, Taped])
def test_sampling_draws_the_same(recorder: Any) -> None:
    model, prompt = tiny_plain("qwen3"), tokens(1, 7)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": True, "eos_token_id": None, "top_p": 0.9}
    texts = []
    for make in (None, lambda model: target_of(model, recorder)):
        spec = spec_for(tokens(1, 40))
        spec.make_target = make
        torch.manual_seed(5)
        texts.append(model.generate(prompt, custom_generate=spec, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("recorder", [Unrecorded, Taped])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_text_that_outgrows_the_buffers(family: str, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "FIRST_ROOM", 8)
    monkeypatch.setattr(recorded, "AHEAD", (1, 4))
    model, prompt = tiny_plain(family), tokens(1, 5)
    target, text = target_of(model, recorder), prompt[0].tolist()
    with torch.no_grad():
        target.prefill(prompt, prompt >= 0, ())
    rooms, recorders = set(), []
    for _ in range(18):
        text.append(20 + len(text) % 40)
        out = score(target, text[-1:], [TREE])
        check(model, out, 0, text, TREE)
        target.keep([[0, 1, 5, 6]])
        text += [5, 9, 10]
        rooms.add(target.cache.written[0].keys.shape[2])
        recorders.append(target._recording._record)
    assert rooms == {32, 64, 128}
    # a memory pool for each: CUDA takes no new graph into a pool whose graphs are gone
    assert len({id(recorder) for recorder in recorders}) == 3


def test_windows_of_the_configuration_alone_are_left_to_the_usual_passes() -> None:
    assert graphed_target(tiny_plain("llama", sliding_window=8), recorder=Unrecorded) is None
    assert graphed_target(tiny_plain("mistral", sliding_window=8), recorder=Unrecorded) is not None


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    model, prompt = tiny_plain("gemma3"), tokens(1, 11)
    whole, pieces = target_of(model, Taped), target_of(model, Taped)
    with torch.no_grad():
        whole.prefill(prompt, prompt >= 0, ())
        for part in prompt.split(4, 1):
            pieces.prefill(part, part >= 0, ())
    a, b = (score(target, [20], [TREE]).logits for target in (whole, pieces))
    assert gap(a, b) < 2e-5


@pytest.mark.parametrize("lengths", [(9, 4, 6), (5,)])
def test_batches_and_padding_take_the_usual_passes(lengths: tuple[int, ...]) -> None:
    model = tiny_plain("gemma3")
    batch = left_padded([tokens(1, n, seed=n)[0] for n in lengths])
    if len(lengths) == 1:
        batch = left_padded([batch["input_ids"][0], tokens(1, 9)[0]])
        batch = {name: value[:1] for name, value in batch.items()}
    before = Taped.made
    target, usual = target_of(model, Taped), HfTarget(model)
    for each in (target, usual):
        with torch.no_grad():
            each.prefill(batch["input_ids"], batch["attention_mask"].bool(), ())
    for kept in ([0, 1, 5], [0], [0, 7, 8]):
        outs = [score(each, [20] * len(lengths), [TREE] * len(lengths)).logits for each in (target, usual)]
        assert torch.equal(*outs)
        for each in (target, usual):
            each.keep([kept] * len(lengths))
    assert Taped.made == before


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_text_can_be_handed_over_to_another_cache(family: str) -> None:
    model, prompt = tiny_plain(family), tokens(1, 7)
    target = target_of(model, Taped)
    with torch.no_grad():
        target.prefill(prompt, prompt >= 0, ())
        score(target, [20], [TREE])
        target.keep([[0, 1, 5]])
        text = [*prompt[0].tolist(), 20, 5, 9]
        cache = DynamicCache(config=model.config)
        target.export(cache)
        assert cache.get_seq_length() == len(text)
        out = model(torch.tensor([[21]]), **{CACHE: cache}, position_ids=torch.tensor([[len(text)]]))
    assert gap(out.logits[0, -1], plain(model, [*text, 21]).logits[0, -1]) < 2e-5


def written(model: Any, prompt: Tensor, recorder: Any = Taped) -> Tensor:
    spec = DiffuSpec(spec_for(tokens(1, 40)).drafter, make_target=lambda model: target_of(model, recorder))
    return model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, custom_generate=spec)


def test_the_next_text_uses_what_was_recorded() -> None:
    model = tiny_plain("gemma3")
    written(model, tokens(1, 30))
    made = Taped.made
    for seed in (2, 3):
        prompt = tokens(1, 8, seed=seed)
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert torch.equal(written(model, prompt), expected)
    assert Taped.made == made
    release_graphs(model)
    written(model, tokens(1, 8))
    assert Taped.made > made


@pytest.mark.parametrize("recorder", [Unrecorded, Taped])
def test_a_text_after_one_with_other_taps(recorder: Any) -> None:
    model = tiny_plain("qwen3")
    for taps, length in (((), 9), ((0, 2), 12), ((), 7)):
        prompt = tokens(1, length)
        target, text = target_of(model, recorder), prompt[0].tolist()
        with torch.no_grad():
            target.prefill(prompt, prompt >= 0, taps)
        for _ in range(3):
            text.append(20 + len(text))
            check(model, score(target, text[-1:], [TREE], taps), 0, text, TREE, taps)
            # a branch behind another one: its columns have to come first
            target.keep([[0, 7, 8]])
            text += [int(TREE.tokens[node]) for node in (6, 7)]
        del target


def test_nothing_of_the_last_text_is_left() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 8)
    target = target_of(model)
    with torch.no_grad():
        target.prefill(prompt, prompt >= 0, ())
        expected = score(target, [20], [TREE]).logits
        for layer in target.cache.written:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        del target
        target = target_of(model)
        target.prefill(prompt, prompt >= 0, ())
        assert torch.equal(score(target, [20], [TREE]).logits, expected)


def test_two_texts_at_a_time_do_not_share() -> None:
    model = tiny_plain("qwen3")
    prompts = tokens(1, 8), tokens(1, 10, seed=3)
    targets = [target_of(model, Taped) for _ in prompts]
    with torch.no_grad():
        for target, prompt in zip(targets, prompts, strict=True):
            target.prefill(prompt, prompt >= 0, ())
        outs = [score(target, [20], [TREE]) for target in targets]
        for target in targets:
            target.keep([[0, 1, 5]])
        for target, prompt, out in zip(targets, prompts, outs, strict=True):
            text = [*prompt[0].tolist(), 20]
            check(model, out, 0, text, TREE)
            check(model, score(target, [21], [PATH]), 0, [*text, 5, 9, 21], PATH)


class Failing(Unrecorded):
    """A recorder that cannot record what takes more than one token."""

    def __call__(self, run: Any) -> Any:
        if run.func.__name__ == "_forward" and run.args[0].ids.shape[1] > 1:
            raise RecordingError("operation not permitted when stream is capturing")
        return run


def test_a_recording_that_fails_is_said_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    model, prompt = tiny_plain("gemma3"), tokens(1, 8)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written(model, prompt, Failing), expected)
    assert caplog.text.count("could not be recorded: operation not permitted when stream is capturing") == 1
    assert graphed_target(model, recorder=Failing) is None
    assert model not in graphed._idle


def test_it_is_the_best_target_of_models_that_the_lean_path_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, gemma = tiny_plain("llama"), tiny_plain("gemma3")
    assert best_target(gemma) is None
    monkeypatch.setattr(best, "graphed_target", partial(graphed_target, recorder=Unrecorded))
    assert isinstance(best_target(gemma), GraphedTarget)
    assert isinstance(best_target(llama), LeanTarget)


def test_changed_weights() -> None:
    model, prompt = tiny_plain("llama"), tokens(1, 8)
    written(model, prompt)
    made = Taped.made
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-2)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written(model, prompt), expected)
    assert Taped.made == made
    model.model.norm.weight = nn.Parameter(-model.model.norm.weight.detach())
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written(model, prompt), expected)
    assert Taped.made > made


def other_window(model: Any) -> None:
    model.config.sliding_window = 3


def other_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 3.0


def other_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 50.0
    model.model.layers[0].input_layernorm.variance_epsilon = 50.0


@pytest.mark.parametrize("change", [other_window, other_scaling, other_epsilon])
def test_changed_settings(change: Any) -> None:
    model, prompt = tiny_plain("mistral"), tokens(1, 8)
    before = written(model, prompt)
    change(model)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written(model, prompt), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("recorder", [Unrecorded, Taped])
def test_recordings_do_not_keep_the_model(recorder: Any) -> None:
    model = tiny_plain("llama")
    written(model, tokens(1, 8), recorder)
    assert model in graphed._idle
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def compiled(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def with_flex_attention(model: Any) -> Any:
    model.set_attn_implementation("flex_attention")
    return model


ROPE = {"rope_theta": 1e4, "factor": 2.0}


REFUSED: dict[str, Any] = {
    "a Zero Token Transformer": lambda: tiny("llama"),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).eval(),
    "frequencies by length": lambda: tiny_plain("llama", rope_parameters={**ROPE, "rope_type": "dynamic"}),
    "a hook": lambda: with_hook(tiny_plain("llama")),
    "a replaced forward": lambda: with_other_forward(tiny_plain("llama")),
    "a compiled model": lambda: compiled(tiny_plain("llama")),
    "a layer of another class": lambda: with_adapter(tiny_plain("llama")),
    "an attention that takes no mask": lambda: with_flex_attention(tiny_plain("llama")),
    "training": lambda: tiny_plain("llama").train(),
    "weights that are elsewhere": lambda: tiny_plain("llama").to("meta"),
    "weights on two devices": lambda: tiny_plain("llama").apply(
        lambda module: module.to("meta") if isinstance(module, nn.Embedding) else None
    ),
    "a module that is no model": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name: str) -> None:
    assert graphed_target(REFUSED[name](), recorder=Unrecorded) is None


def test_refused_without_cuda_and_while_autocast_is_on() -> None:
    model = tiny_plain("llama")
    assert graphed_target(model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert graphed_target(model, recorder=Unrecorded) is None
    plain(model, [3, 4])  # asks for hidden states, for which transformers hooks the layers
    assert graphed_target(model, recorder=Unrecorded) is not None


@pytest.mark.real_model
def test_smollm2_writes_the_same_tokens() -> None:
    path = resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer("one two three four one two three", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    decode = DiffuSpec(PromptLookupDrafter(), make_target=lambda model: target_of(model, Taped))
    assert torch.equal(model.generate(**prompt, max_new_tokens=24, do_sample=False, custom_generate=decode), expected)
