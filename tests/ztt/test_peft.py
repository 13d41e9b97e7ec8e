"""PEFT on a Zero Token Transformer: zero tokens, gates and per-cycle LoRA are trained and saved where named."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ztt.tiny import gap, open_gates, tiny_plain, tokens
from zerodraft import ZerodraftError, ZttForCausalLM
from zerodraft.training.ztt.adapters import load_adapters
from zerodraft.ztt.convert import from_base
from zerodraft.ztt.pretrained import OWN_PARTS

peft = pytest.importorskip("peft", reason="needs the peft extra")
# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

OWN = {"zero_tokens", "cycle_gates"}
TARGETS = {"llama": ["q_proj"], "gpt2": ["c_attn"]}


def converted(family: str = "llama", **settings: Any) -> ZttForCausalLM:
    torch.manual_seed(0)
    return from_base(tiny_plain(family), cycles=2, **settings)


def adapted(model: ZttForCausalLM, names: set[str], family: str = "llama") -> Any:
    kind = {"fan_in_fan_out": True} if family == "gpt2" else {}
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS[family], modules_to_save=sorted(names), task_type="CAUSAL_LM", **kind
    )
    return peft.get_peft_model(model, config)


def train(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = tokens()
    for _ in range(4):
        model(input_ids=ids, labels=ids, cycle_weights=(1, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def states(model: Any) -> tuple[Tensor, Tensor]:
    whole = model.eval().get_base_model() if hasattr(model, "get_base_model") else model.eval()
    return model(input_ids=tokens()).logits, whole.model(tokens()).last_hidden_state


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("parts", [OWN, {*OWN_PARTS}], ids=["own parts", "every own part"])
def test_named_parts_are_trained_and_come_back(family: str, parts: set[str], tmp_path: Path) -> None:
    others: dict[str, Any] = {part: True for part in ("input_injection", "cycle_scales") if part in parts}
    others |= {"residual_streams": 2} if "residual_streams" in parts else {}
    model = converted(family, cycle_lora_rank=2 if "cycle_lora" in parts else 0, **others)
    start = copy.deepcopy(model)
    tuned = adapted(model, parts, family)
    trainable = {name for name, p in tuned.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {name.split(".")[2] for name in trainable} == parts
    before = states(tuned)
    assert gap(before[0], start(tokens()).logits) == 0
    train(tuned.train())
    assert all(p.grad is None for name, p in tuned.named_parameters() if "original_module" in name)
    after = states(tuned)
    assert gap(after[0], before[0]) > 1e-2
    for part in parts:
        fresh = copy.deepcopy(tuned)
        with torch.no_grad():
            for p in getattr(fresh.get_base_model(), part).modules_to_save["default"].parameters():
                p.zero_()
        assert gap(states(fresh)[0], after[0]) > 1e-5, f"what was trained in {part} is used"
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
    assert gap(states(again)[0], after[0]) == 0
    assert gap(states(again)[1], after[1]) == 0
    with tuned.disable_adapter():
        assert gap(states(tuned)[0], before[0]) == 0
    assert torch.equal(tuned.generate(tokens(), max_new_tokens=4), again.generate(tokens(), max_new_tokens=4))
    merged = tuned.merge_and_unload()
    assert gap(states(merged)[0], after[0]) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert gap(states(ZttForCausalLM.from_pretrained(tmp_path / "merged"))[0], after[0]) < 1e-5


def test_the_decoder_follows_adapters_that_come_and_go() -> None:
    model = converted()
    open_gates(model, 0.5)
    plain = states(model)[1]
    tuned = adapted(model, OWN)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.3)
    changed = states(tuned)[1]
    assert gap(changed, plain) > 1e-3
    assert gap(states(tuned.unload())[1], plain) > 1e-3  # the saved modules stay, as PEFT has it
    assert gap(states(converted())[1], plain) > 1e-3


def test_adapters_through_transformers_own_door(tmp_path: Path) -> None:
    model = converted()
    open_gates(model, 0.5)
    before = states(model)[0]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip("this transformers wants a newer PEFT for its own door")
    after = states(model)[0]
    assert gap(after, before) > 1e-4
    model.save_pretrained(tmp_path)
    again = converted()
    open_gates(again, 0.5)
    again.load_adapter(str(tmp_path))
    assert gap(states(again)[0], after) == 0
    model.disable_adapters()
    assert gap(states(model)[0], before) == 0


def test_adapters_of_an_older_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero_tokens.safetensors").touch()
    with pytest.raises(ZerodraftError, match="written by an older version"):
        load_adapters(converted(), tmp_path)
