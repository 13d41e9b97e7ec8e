"""Targets as people load them: with quantised weights, or with layers that accelerate keeps on the disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.decoding.generating import NEW, both, prompts_of, spec_for
from tests.ztt.tiny import gap, tiny_plain
from zerodraft.fast.lean import lean_target

LAYERS = "model.layers."


class Int8Linear(nn.Module):
    """Weights of eight bits with one scale a row, as weight-only quantisation has them."""

    weight: Tensor
    scale: Tensor

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        scale = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (source.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def quantised(family: str) -> Any:
    model = tiny_plain(family)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            assert module.bias is None
            model.set_submodule(name, Int8Linear(module))
    return model


def on_disk(folder: Path, first: int) -> Any:
    """A model whose layers from number `first` on lie on the disk until they are needed."""
    tiny_plain("llama").save_pretrained(folder / "model")
    places = {f"{LAYERS}{i}": "disk" if i >= first else "cpu" for i in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offloaded"
    ).eval()
    assert model.get_submodule(f"{LAYERS}3").mlp.up_proj.weight.device.type == "meta"
    return model


@pytest.mark.parametrize("kind", ["path", "tree"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_quantised_layers(family: str, kind: str) -> None:
    model = quantised(family)
    assert lean_target(model) is None
    for rows in (1, 3):
        plain, ours, spec = both(model, prompts_of(rows), kind, eos_token_id=None)
        assert torch.equal(plain, ours)
        assert spec.last_stats.accepted > 3


@pytest.mark.parametrize("first", [2, 0])
def test_layers_on_the_disk(first: int, tmp_path: Path) -> None:
    model, whole = on_disk(tmp_path, first), tiny_plain("llama")
    assert lean_target(model) is None
    for rows in (1, 3):
        batch = prompts_of(rows)
        plain = whole.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        spec = spec_for(plain, batch.get("attention_mask"))
        spec.drafter.taps = (0, 2)
        ours = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None, custom_generate=spec)
        assert torch.equal(plain, ours)
        assert spec.last_stats.accepted > 3
        taps = torch.cat([step[0].taps for step in spec.drafter.log])
        start = 0 if rows == 1 else int((batch["attention_mask"][0] == 0).sum())
        with torch.no_grad():
            hidden = whole(plain[:1, start : start + len(taps)], output_hidden_states=True).hidden_states
        assert gap(taps, torch.stack([hidden[0][0], hidden[2][0]], 1)) < 2e-5
    assert model.get_submodule(f"{LAYERS}3").mlp.up_proj.weight.device.type == "meta"
