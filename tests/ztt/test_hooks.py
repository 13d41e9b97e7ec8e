"""Merged adapters compute what they computed before, whatever hooks of ours stand on the projections they wrap."""

import copy
from typing import Any

import pytest
import torch

from tests.ztt.every_family import tiny_config
from tests.ztt.tiny import FAMILIES, gap, tiny, tokens
from zerodraft.ztt.lora import projections

peft = pytest.importorskip("peft", reason="needs the peft extra")
# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

EVERYTHING: dict[str, Any] = {"ffn_gate": True, "cycle_lora_rank": 2, "cycle_gates": True, "edge_zero_tokens": True}


def adapted(model: Any, **settings: Any) -> Any:
    """The model with random adapters on every projection of its layers."""
    names = {name.rpartition(".")[2] for layer in model.layers for name, _ in projections(layer)}
    conv = {"fan_in_fan_out": True} if "c_attn" in names else {}
    targets = rf"base\..*\.({'|'.join(sorted(names))})"  # not those in the per-cycle LoRA that are called the same
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **conv, **settings)).eval()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return tuned


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "modernbert-decoder"])
@torch.no_grad()
def test_on_merged_and_by_hand(family: str, kind: dict[str, Any]) -> None:
    base = None if family in FAMILIES else tiny_config(family)
    model, ids = tiny(family, base=base, **EVERYTHING), tokens()
    by_hand, plain = copy.deepcopy(model), model(ids).logits
    tuned = adapted(model, **kind)
    on = tuned(input_ids=ids).logits
    assert gap(on, plain) > 1e-3
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert gap(merged(ids).logits, on) <= 1e-4
    if not kind:
        for name, module in tuned.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                by_hand.get_submodule(name).weight.add_(module.get_delta_weight("default"))
        assert gap(by_hand(ids).logits, on) <= 1e-4
    with tuned.disable_adapter():
        assert gap(tuned(input_ids=ids).logits, plain) <= 1e-5
    tuned.merge_adapter()
    assert gap(tuned(input_ids=ids).logits, on) <= 1e-4
    tuned.unmerge_adapter()
    assert gap(tuned(input_ids=ids).logits, on) <= 1e-4
    assert gap(tuned.unload()(ids).logits, plain) <= 1e-5
