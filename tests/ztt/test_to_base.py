"""Back to a plain model of the base family: exact where it can be, else refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.ztt.tiny import FAMILIES, LAYERS, base_config, logits, open_gates, randomise, tiny_plain, unpositioned
from zerodraft import ZerodraftError, ZttConfig, ZttForCausalLM
from zerodraft.models.loading import load_pretrained
from zerodraft.ztt.convert import from_base, to_base


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str) -> None:
    base = tiny_plain(family)
    plain = to_base(from_base(base, cycles=1))
    assert type(plain) is type(base)
    assert torch.equal(logits(plain), logits(base))
    assert plain.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", ["block", "layer"])
def test_unrolled_equals_cycled(family: str, schedule: str) -> None:
    config = ZttConfig(base_config=unpositioned(family), cycles=2, schedule=schedule, zero_tokens=False)
    model = ZttForCausalLM(config).eval()
    randomise(model)
    plain = to_base(model, unroll=True)
    assert plain.config.num_hidden_layers == config.num_hidden_layers == LAYERS + 2
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    weights = {weight.data_ptr() for weight in plain.parameters()}
    assert weights.isdisjoint(weight.data_ptr() for weight in model.parameters())


def test_closed_gates_are_left_out_and_open_ones_baked() -> None:
    base = tiny_plain()
    deep = from_base(base, cycles=3)
    plain = to_base(deep, unroll=True)
    assert plain.config.num_hidden_layers == LAYERS
    assert torch.equal(logits(plain), logits(base))
    bare = from_base(base, cycles=2, zero_tokens=False)
    assert bare.cycle_gates is not None
    with torch.no_grad():
        bare.cycle_gates.weight[0, 1] = 1
    plain = to_base(bare, unroll=True)
    assert plain.config.num_hidden_layers == LAYERS + 1
    torch.testing.assert_close(logits(plain), logits(bare), atol=1e-5, rtol=1e-5)


def test_unrolled_model_can_be_saved_and_loaded_as_plain(tmp_path: Path) -> None:
    model = from_base(tiny_plain(), mode="compress", cycles=2, zero_tokens=False)
    to_base(model, unroll=True).save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs the peft extra")
    page = Path(__file__).parents[2] / "docs" / "convert.md"
    monkeypatch.chdir(tmp_path)
    tiny_plain(num_hidden_layers=6).save_pretrained("my-model")
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "convert"})
    tuned: Any = load_pretrained(AutoModelForCausalLM, tmp_path / "my-ztt-tuned")
    assert bool((tuned.cycle_gates.weight != 0).all())


def test_what_a_plain_model_cannot_compute() -> None:
    deep = from_base(tiny_plain(), cycles=2)
    with pytest.raises(ZerodraftError, match="unroll=True gives"):
        to_base(deep)
    open_gates(deep, 1.0)
    with pytest.raises(ZerodraftError, match="attends to a zero token in cycle 2"):
        to_base(deep, unroll=True)
    bare = from_base(tiny_plain(), cycles=2, zero_tokens=False)
    open_gates(bare, 0.25)
    with pytest.raises(ZerodraftError, match=r"gate of layer 1 in cycle 2 is 0\.25"):
        to_base(bare, unroll=True)


@torch.no_grad()
def test_cycles_that_are_fed_or_scaled_do_not_convert_back() -> None:
    base = tiny_plain()
    deep = from_base(base, cycles=2, zero_tokens=False, input_injection=True, cycle_scales=True)
    open_gates(deep, 1.0)
    torch.testing.assert_close(logits(to_base(deep, unroll=True)), logits(deep), atol=1e-5, rtol=1e-5)
    deep.cycle_scales.weight[1] = 1.5
    with pytest.raises(
        ZerodraftError, match=r"output of cycle 2 is multiplied by 1\.5, which a plain LlamaForCausalLM"
    ):
        to_base(deep, unroll=True)
    deep.input_injection.weight[0] = -0.25
    with pytest.raises(ZerodraftError, match=r"Cycle 2 adds -0\.25 of the head's output"):
        to_base(deep, unroll=True)


@torch.no_grad()
def test_streams_that_are_mixed_do_not_convert_back() -> None:
    deep = from_base(tiny_plain(), cycles=2, zero_tokens=False, residual_streams=2)
    open_gates(deep, 1.0)
    torch.testing.assert_close(logits(to_base(deep, unroll=True)), logits(deep), atol=1e-5, rtol=1e-5)
    deep.residual_streams.weight[0, 3] = 0.25
    with pytest.raises(ZerodraftError, match="cycles mix 2 residual streams, which a plain LlamaForCausalLM cannot"):
        to_base(deep, unroll=True)


def test_layers_that_know_their_position_are_not_unrolled() -> None:
    config = ZttConfig(base_config=base_config("gpt2"), cycles=2, zero_tokens=False)
    assert config.scale_attn_by_inverse_layer_idx
    model = ZttForCausalLM(config)
    randomise(model)
    with pytest.raises(ZerodraftError, match="depend on their position"):
        to_base(model, unroll=True)
