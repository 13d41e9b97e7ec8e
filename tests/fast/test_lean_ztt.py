"""The lean path of Zero Token Transformers: written tokens, shared weights. Logits and cache: `test_lean`."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoding.generating import NEW, prompts_of, spec_for
from tests.fast.cycled import CYCLED, over
from tests.fast.test_target import PATH, check, plain, score
from tests.ztt.tiny import gap, tiny, tiny_plain, tokens
from zerodraft import ZttForCausalLM, ZttModel
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.fast.target import HfTarget

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "ztt-million-exits"


def generated(model: Any, rows: int, **options: Any) -> tuple[Any, Any, list[LeanTarget | None]]:
    """What plain decoding writes and what drafts over the lean path do, and the targets that were made."""
    batch = prompts_of(rows)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    answers = model.generate(**batch, **options)
    spec = spec_for(answers, batch.get("attention_mask"))
    spec.drafter.taps = (0, 3)
    made: list[LeanTarget | None] = []

    def make(model: Any) -> LeanTarget | None:
        made.append(lean_target(model))
        return made[-1]

    spec.make_target = make
    return answers, model.generate(**batch, **options, custom_generate=spec), made


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CYCLED)
def test_the_same_tokens_are_written(name: str, rows: int) -> None:
    answers, ours, made = generated(CYCLED[name](), rows)
    assert torch.equal(ours, answers)
    assert [type(target) for target in made] == [LeanTarget]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_are_numbered_as_transformers_numbers_them(attention: str) -> None:
    parts = {"cycle_gates": True, "input_injection": True, "cycle_scales": True}
    model, prompt = tiny("qwen3", tail_layers=0, **parts), tokens(2, 8)
    model.set_attn_implementation(attention)
    taps = tuple(range(model.config.num_hidden_layers + 1))
    with torch.no_grad():
        expected = HfTarget(model).prefill(prompt, prompt >= 0, taps)
    target = lean_target(model)
    assert target is not None
    found = target.prefill(prompt, prompt >= 0, taps)
    assert gap(found.taps, expected.taps) < 2e-5
    text = prompt[0].tolist()
    check(model, score(target, [7, 7], [PATH, PATH], taps), 0, [*text, 7], PATH, taps)


def test_executions_of_a_layer_share_its_packed_weights() -> None:
    model = over("qwen3", cycle_gates=True, edge_zero_tokens=True)
    target = lean_target(model)
    assert target is not None
    weights = target._weights
    steps = model.config.steps()
    assert len(weights.layers) == len(steps) == 8
    first = {step.layer: weights.layers[step.slot] for step in reversed(steps)}
    for step, layer in zip(steps, weights.layers, strict=True):
        for part in ("qkv", "out", "gate", "up", "down", "qk_gain"):
            assert getattr(layer, part) is getattr(first[step.layer], part)
        assert layer.zero is not None
        assert (layer.zero.gate is None) == (step.cycle == 0)
    for part in ("qkv", "out", "gate", "up", "down"):
        assert len({id(getattr(layer, part)) for layer in weights.layers}) == 4
    keys = [layer.zero.key for layer in weights.layers]
    assert len({key.data_ptr() for key in keys}) == 8


def test_release_gives_the_memory_back() -> None:
    model = tiny("qwen3")
    target = lean_target(model)
    assert target is not None
    layer = target._weights.layers[1]
    parts = [weakref.ref(part) for part in (layer.zero.key, layer.qk_gain, target._cache.kv)]
    del layer
    target.release()
    gc.collect()
    assert [part() for part in parts] == [None, None, None]
    assert lean_target(model) is not None


def test_the_packed_weights_do_not_keep_the_model() -> None:
    model = tiny("llama", ffn_gate=True, cycle_gates=True)
    target, alive = lean_target(model), weakref.ref(model)
    assert target is not None
    del model
    gc.collect()
    assert alive() is None
    prompt = tokens(1, 4)
    assert target.prefill(prompt, prompt >= 0, ()).logits.isfinite().all()


OWN = [
    "zero_tokens.keys",
    "zero_tokens.edge_keys",
    "cycle_gates.weight",
    "input_injection.weight",
    "cycle_scales.weight",
]


@pytest.mark.parametrize("name", OWN)
def test_changed_own_parts_are_noticed(name: str) -> None:
    options = dict.fromkeys(("cycle_gates", "edge_zero_tokens", "input_injection", "cycle_scales"), True)
    model, prompt = tiny("llama", **options), tokens(1, 6)
    before = lean_target(model).prefill(prompt, prompt >= 0, ()).logits
    with torch.no_grad():
        model.get_parameter(name).add_(0.5)
    after = lean_target(model).prefill(prompt, prompt >= 0, ()).logits
    assert gap(after[0, 0], plain(model, prompt[0].tolist()).logits[0, -1]) < 2e-5
    assert gap(before, after) > 1e-3


def with_hook(model: ZttForCausalLM) -> ZttForCausalLM:
    model.zero_tokens.register_forward_hook(lambda module, args, output: {})
    return model


def with_flex(model: ZttForCausalLM) -> ZttForCausalLM:
    model.set_attn_implementation("flex_attention")
    return model


class Longer(ZttForCausalLM):
    """Stands for any model that is a Zero Token Transformer and more."""


REFUSED: dict[str, Any] = {
    "another family": lambda: tiny("gemma3"),
    "per-cycle LoRA": lambda: tiny("llama", cycle_lora_rank=2),
    "residual streams": lambda: tiny("llama", residual_streams=2),
    "no LM head": lambda: ZttModel(tiny("llama").config),
    "a family's model with its layers cycled": lambda: tiny("llama").base,
    "a subclass": lambda: Longer(tiny("llama").config),
    "flex attention": lambda: with_flex(tiny("llama")),
    "a hook": lambda: with_hook(tiny("llama")),
    "half precision": lambda: tiny("llama").to(torch.bfloat16),
    "dropout in training": lambda: over("llama", {"attention_dropout": 0.1}).train(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_exactly_is_refused(name: str) -> None:
    assert lean_target(REFUSED[name]()) is None


def test_a_plain_model_may_not_have_the_hooks_of_a_cycled_one() -> None:
    hooks = tiny("llama", ffn_gate=True).layers[1].mlp._forward_hooks
    model = tiny_plain("llama")
    model.model.layers[1].mlp.register_forward_hook(*hooks.values())
    assert lean_target(model) is None


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the source distribution is without models")
def test_the_shipped_model_writes_the_same_tokens() -> None:
    model: Any = ZttForCausalLM.from_pretrained(SHIPPED)
    prompt = torch.randint(3, 2048, (1, 12), generator=torch.Generator().manual_seed(0))
    answers = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    target = lean_target(model)
    assert target is not None
    start = answers.shape[1] - 8
    target.prefill(answers[:, :start], answers[:, :start] >= 0, ())
    causal = torch.ones(1, 8, 8, dtype=torch.bool).tril()
    out = target.score(answers[:, start:], torch.arange(8)[None], causal, ())
    assert gap(out.logits[0], plain(model, answers[0].tolist()).logits[0, start:]) < 1e-4
    spec = spec_for(answers)
    spec.make_target = lean_target
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **options, custom_generate=spec), answers)
