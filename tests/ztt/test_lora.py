"""Per-cycle LoRA: another delta in every cycle, through saving, checkpointing and early exit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.ztt.tiny import logits, open_gates, randomise, tiny_plain, tokens, unpositioned
from zerodraft import FixedExit, ZttForCausalLM
from zerodraft.models.loading import load_pretrained
from zerodraft.ztt.convert import from_base, to_base
from zerodraft.ztt.lora import matrix, projections


@torch.no_grad()
def train_lora(model: ZttForCausalLM) -> None:
    assert model.cycle_lora is not None
    for weight in model.cycle_lora.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_adds_another_delta_in_each_cycle(family: str) -> None:
    """Equal to the unrolled plain model whose projections have the deltas added to their weights."""
    plain = AutoModelForCausalLM.from_config(unpositioned(family)).eval()
    randomise(plain)
    model = from_base(plain, mode="compress", cycles=2, cycle_lora_rank=3, zero_tokens=False)
    start = logits(model)
    train_lora(model)
    assert not torch.allclose(logits(model), start, atol=1e-3)
    assert model.cycle_lora is not None
    for name, projection in projections(model.layers[1]):
        first, second = (model.cycle_lora.delta(0, name).weight(cycle) for cycle in range(2))
        assert first.shape == matrix(projection).shape
        assert not torch.equal(first, second)
    torch.testing.assert_close(logits(to_base(model, unroll=True)), logits(model), atol=1e-5, rtol=1e-5)


def test_trained_lora_survives_saving(tmp_path: Path) -> None:
    model = from_base(tiny_plain(), cycles=2, cycle_lora_rank=3)
    train_lora(model)
    open_gates(model, 0.7)
    model.save_pretrained(tmp_path)
    again = load_pretrained(AutoModelForCausalLM, tmp_path)
    assert isinstance(again, ZttForCausalLM)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_gradients_under_checkpointing(reentrant: bool) -> None:
    model = from_base(tiny_plain(), cycles=3, cycle_lora_rank=2).train()
    train_lora(model)
    open_gates(model, 0.5)
    inputs = tokens()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(inputs, labels=inputs).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert any(name.startswith("cycle_lora") and bool((grad != 0).any()) for name, grad in plain.items())
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 4])
@torch.no_grad()
def test_exited_tokens_get_the_keys_of_every_cycle(depth: int) -> None:
    """Cycles with LoRA of their own make other keys of the same frozen state, also when nobody runs any more."""
    model = from_base(tiny_plain(), cycles=4, cycle_lora_rank=2)
    randomise(model)
    inputs = tokens()
    exited: Any = model(inputs, exit_rule=FixedExit(cycles=depth))
    oracle: Any = model(inputs, exit_depth=torch.full_like(inputs, depth))
    for ours, theirs in zip(exited.past_key_values.layers, oracle.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)
