"""More cycles for a pretrained model: exactly the base model at the start, and able to learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ztt.tiny import FAMILIES, LAYERS, logits, open_gates, tiny_plain, tokens
from zerodraft import ZttForCausalLM
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.ztt.convert import from_base


@pytest.mark.parametrize("family", FAMILIES)
def test_deepened_model_starts_as_the_base_model(family: str) -> None:
    base = tiny_plain(family)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = base.config.to_dict()
    deep = from_base(base, cycles=3, cycle_lora_rank=2)
    assert deep.config.num_hidden_layers == 1 + 3 * (LAYERS - 2) + 1
    assert torch.equal(logits(deep), logits(base))
    prompt = tokens()
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    generated: Any = deep.generate(prompt, **greedy)
    assert torch.equal(generated, base.generate(prompt, **greedy))
    # the caller's model is as it was, and shares no memory with the new one
    assert base.config.to_dict() == config
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    ours = {weight.data_ptr() for weight in deep.parameters()}
    assert ours.isdisjoint(weight.data_ptr() for weight in base.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "layer"},
        {"head_layers": 0, "tail_layers": 0},
        {"zero_rope": "none"},
        {"zero_tokens": False},
        {"ffn_gate": True},
        {"cycles": 1},
        {"input_injection": True, "cycle_scales": True, "cycles": 3},
        {"input_injection": True, "cycle_scales": True, "cycles": 1},
        {"residual_streams": 4, "cycles": 4},
        {"residual_streams": 3, "input_injection": True, "cycles": 3},
    ],
    ids=str,
)
def test_every_deepening_is_exact(settings: dict[str, Any]) -> None:
    base = tiny_plain()
    assert torch.equal(logits(from_base(base, **settings)), logits(base))


def test_deepened_model_learns_through_its_gates() -> None:
    deep = from_base(tiny_plain(), cycles=2).train()
    inputs = tokens()
    deep(inputs, labels=inputs).loss.backward()
    assert deep.cycle_gates is not None
    assert deep.cycle_gates.weight.grad is not None
    assert bool((deep.cycle_gates.weight.grad != 0).all())
    open_gates(deep, 0.5)
    assert not torch.allclose(logits(deep), logits(tiny_plain()), atol=1e-3)


def test_deepened_model_learns_how_much_to_feed_again_and_to_scale() -> None:
    """From the first step on, with all gates closed."""
    deep = from_base(tiny_plain(), cycles=3, input_injection=True, cycle_scales=True).train()
    assert deep.config.input_injection_start == 0
    inputs = tokens()
    deep(inputs, labels=inputs).loss.backward()
    for part in (deep.input_injection, deep.cycle_scales):
        assert bool((part.weight.grad != 0).all())
    with torch.no_grad():
        deep.input_injection.weight.fill_(0.1)
    assert not torch.allclose(logits(deep), logits(tiny_plain()), atol=1e-3)


def test_dtype_and_generation_settings_are_taken_over() -> None:
    base = tiny_plain().to(torch.bfloat16)
    base.generation_config.max_new_tokens = 5
    deep = from_base(base)
    assert {weight.dtype for weight in deep.parameters()} == {torch.bfloat16}
    assert deep.generation_config is not None
    assert deep.generation_config.max_new_tokens == 5
    assert deep.generation_config is not base.generation_config
    assert torch.equal(logits(deep), logits(base))


def test_frequencies_that_have_grown_are_taken_over_as_grown() -> None:
    """`dynamic` frequencies follow the longest text so far: the copy has to know which one that was."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = tiny_plain("llama", max_position_embeddings=12, rope_parameters=rope)
    short, long = tokens(1, 8), tokens(1, 20)
    base(long)
    model = from_base(base, cycles=2)
    for text in (short, long, short):
        assert torch.equal(model(text).logits, base(text).logits)


def test_from_a_directory(tmp_path: Path) -> None:
    base = tiny_plain()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(ZttForCausalLM.from_base(tmp_path)), logits(base))


@pytest.mark.real_model
def test_deepened_smollm2_is_smollm2() -> None:
    """Logits and greedy text bit for bit; the loss falls as soon as the gates may move."""
    base: Any = load_pretrained(AutoModelForCausalLM, resolve("smollm2"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2"))
    deep: Any = ZttForCausalLM.from_base(base, cycles=2)
    assert deep.config.num_hidden_layers == 58
    prompt = tokenizer("The Seine runs through Paris and into the", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(deep(**prompt).logits, base(**prompt).logits)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(deep.generate(**prompt, **greedy), base.generate(**prompt, **greedy))
    before = deep(**prompt, labels=prompt["input_ids"]).loss
    before.backward()
    with torch.no_grad():
        deep.cycle_gates.weight -= 1e-3 * deep.cycle_gates.weight.grad.sign()
        assert deep(**prompt, labels=prompt["input_ids"]).loss < before
