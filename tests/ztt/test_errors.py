"""What does not fit is refused in one sentence that names it, before anything is computed."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config

from tests.ztt.tiny import base_config, tiny, tokens
from zerodraft import FixedExit, ZerodraftError, ZttConfig, ZttForCausalLM
from zerodraft.ztt.exits import check_policy


@pytest.fixture(scope="module")
def model() -> ZttForCausalLM:
    return tiny("llama")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"head_layers": -1}, "head_layers=-1 must be a whole number of at least 0"),
        ({"tail_layers": 1.5}, "tail_layers=1.5 must be a whole number"),
        ({"cycles": 0}, "cycles=0 must be a whole number of at least 1"),
        ({"cycles": "two"}, "cycles='two' must be a whole number"),
        ({"cycle_lora_rank": -2}, "cycle_lora_rank=-2"),
        ({"head_layers": 2, "tail_layers": 2}, "leave no layer to cycle in a model of 4 stored layers"),
        ({"head_layers": 3, "tail_layers": 2, "cycles": 1}, "head_layers=3 and tail_layers=2 leave no layer"),
        ({"schedule": "spiral"}, "schedule='spiral' is unknown; choose one of block, layer"),
        ({"zero_rope": "everywhere"}, "zero_rope='everywhere' is unknown; choose one of origin, none, relative"),
        ({"zero_token_start": 0}, "zero_token_start=0 must lie between 1 and cycles \\+ 1 = 3"),
        ({"zero_token_start": 4}, "zero_token_start=4 must lie between"),
        ({"zero_token_start": 1.5}, r"zero_token_start=1\.5 must lie between"),
        ({"zero_token_start": "2"}, "zero_token_start='2' must lie between"),
        ({"cycles": True}, "cycles=True must be a whole number"),
        ({"residual_streams": True}, "residual_streams=True must be a whole number"),
        ({"zero_tokens": "no"}, "zero_tokens='no' must be true or false"),
        ({"ffn_gate": 1}, "ffn_gate=1 must be true or false"),
        ({"cycle_gates": "false"}, "cycle_gates='false' must be true or false"),
        (
            {"input_injection": True, "schedule": "layer"},
            'input_injection needs schedule="block": with "layer" the cycles',
        ),
        ({"cycle_scales": True, "schedule": "layer"}, 'cycle_scales needs schedule="block"'),
        ({"residual_streams": 2, "schedule": "layer"}, 'residual_streams needs schedule="block"'),
        ({"residual_streams": 0}, "residual_streams=0 must be a whole number of at least 1"),
        ({"residual_streams": 1.5}, r"residual_streams=1\.5 must be a whole number"),
        ({"input_injection_start": "x"}, "input_injection_start='x' must be a finite number"),
        ({"input_injection_start": True}, "input_injection_start=True must be a finite number"),
        ({"input_injection_start": float("nan")}, "input_injection_start=nan must be a finite number"),
    ],
)
def test_configuration(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ZerodraftError, match=complaint) as raised:
        ZttConfig(base_config=base_config("llama"), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["flash_attention_2", "paged|sdpa", "nonsense"])
def test_attention_backend(backend: str, model: ZttForCausalLM) -> None:
    complaint = f"attn_implementation='{backend}' is not supported; choose one of sdpa, eager, flex_attention"
    with pytest.raises(ZerodraftError, match=complaint.replace("|", r"\|")):
        model.set_attn_implementation(backend)
    with pytest.raises(ZerodraftError, match="one name"):
        model.set_attn_implementation({"": "sdpa"})
    assert model.config._attn_implementation == "sdpa"


def test_flash_attention_is_refused_when_the_model_is_built() -> None:
    config = ZttConfig(base_config=base_config("llama"))
    with pytest.raises((ZerodraftError, ImportError, ValueError)) as raised:
        ZttForCausalLM._from_config(config, attn_implementation="flash_attention_2")
    assert "flash" in str(raised.value).lower()


def test_capped_scores_are_refused() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    base = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    capped = AutoModelForCausalLM.from_config(ZttConfig(base_config=base), attn_implementation="eager")
    with pytest.raises(ZerodraftError, match="zero_tokens=False"):
        capped(tokens())
    plain = ZttConfig(base_config=base, zero_tokens=False)
    AutoModelForCausalLM.from_config(plain, attn_implementation="eager")(tokens())


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": tokens(), "inputs_embeds": torch.zeros(2, 9, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": tokens()[:, :0]}, "The prompt is empty"),
        ({"inputs_embeds": torch.zeros(2, 0, 32)}, "The prompt is empty"),
        ({"input_ids": tokens(), "cycles": 0}, "cycles=0 must lie between 1 and the model's 3"),
        ({"input_ids": tokens(), "cycles": 4}, "cycles=4 must lie between 1 and the model's 3"),
        (
            {"input_ids": tokens(), "exit_rule": FixedExit(cycles=1), "exit_depth": torch.ones(2, 9, dtype=torch.long)},
            "only one of exit_rule, exit_depth and cycle_weights",
        ),
        (
            {"input_ids": tokens(), "labels": tokens(), "cycle_weights": [1, 1, 1], "exit_rule": FixedExit(cycles=1)},
            "only one of exit_rule, exit_depth and cycle_weights",
        ),
        ({"input_ids": tokens(), "labels": tokens(), "cycle_weights": [1, 1]}, "needs labels and one weight for each"),
        ({"input_ids": tokens(), "cycle_weights": [1, 1, 1]}, "needs labels and one weight for each"),
        ({"input_ids": tokens(), "labels": tokens(), "distil_cycles": True}, "distil_cycles=True needs cycle_weights"),
    ],
)
def test_forward(inputs: dict[str, Any], complaint: str, model: ZttForCausalLM) -> None:
    with pytest.raises(ZerodraftError, match=complaint):
        model(**inputs)


def test_exits_need_cycles_that_end() -> None:
    by_layer = tiny("llama", schedule="layer")
    for options in ({"exit_rule": FixedExit(cycles=1)}, {"exit_depth": torch.ones(2, 9, dtype=torch.long)}):
        with pytest.raises(ZerodraftError, match='Early exit needs schedule="block"'):
            by_layer(tokens(), **options)
    with pytest.raises(ZerodraftError, match='Early exit needs schedule="block"'):
        by_layer.generate(tokens(), exit_rule=FixedExit(cycles=1), max_new_tokens=2)


@torch.no_grad()
def test_a_cache_that_was_filled_with_fewer_cycles(model: ZttForCausalLM) -> None:
    past = model(tokens(), cycles=1, use_cache=True).past_key_values
    with pytest.raises(ZerodraftError, match="filled with fewer than 3 cycles; use exit_rule=FixedExit"):
        model(tokens(2, 1), past_key_values=past)
    lengths = [past.get_seq_length(slot) for slot in range(3)]
    model(tokens(2, 1), past_key_values=past, cycles=1)
    assert [past.get_seq_length(slot) for slot in range(3)] == [length + 1 for length in lengths]


def test_weighted_losses_take_no_cache(model: ZttForCausalLM) -> None:
    out = model(tokens(), labels=tokens(), cycle_weights=[1, 1, 1], past_key_values=DynamicCache())
    assert out.past_key_values is None


def test_policy_and_prompt_of_generate(model: ZttForCausalLM) -> None:
    with pytest.raises(ZerodraftError, match="exit_policy='never' is unknown; choose one of propagate, latest"):
        check_policy("never")
    with pytest.raises(ZerodraftError, match="The prompt is empty"):
        model.generate(tokens()[:, :0], max_new_tokens=2)


def test_a_model_that_was_not_calibrated(model: ZttForCausalLM) -> None:
    with pytest.raises(ZerodraftError, match="zerodraft calibrate"):
        model.calibrated_exit_rule()


@torch.no_grad()
def test_a_refused_call_leaves_the_model_as_it_was(model: ZttForCausalLM) -> None:
    expected = model(tokens()).logits
    for inputs in ({"input_ids": tokens(), "cycles": 9}, {}):
        with pytest.raises(ZerodraftError):
            model(**inputs)

    def fails(out: Any) -> None:
        raise RuntimeError("inside a rule")

    with pytest.raises(RuntimeError, match="inside a rule"):
        model(tokens(), exit_rule=fails)
    assert torch.equal(model(tokens()).logits, expected)
    assert model.layers[0] is next(iter(model.base.model.layers)), "outside a pass the list holds the layers"
