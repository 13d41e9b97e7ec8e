"""`ZttConfig`: the schedule, what it takes over from the base configuration, and that it survives a file."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tests.ztt.tiny import FAMILIES, base_config, tiny, tokens
from tests.ztt.unrolled import executions
from zerodraft import ZttConfig


def config_of(stored: int = 4, **options: object) -> ZttConfig:
    return ZttConfig(base_config=base_config("llama", num_hidden_layers=stored), **options)


def order(config: ZttConfig) -> str:
    """Stored layers in the order of execution, counted from 1 as in the papers."""
    return "".join(str(step.layer + 1) for step in config.steps())


def test_schedules_of_the_papers() -> None:
    assert order(config_of(6)) == "1234523456"
    assert order(config_of(6, schedule="layer")) == "1223344556"
    assert order(config_of(6, cycles=1)) == "123456"
    assert order(config_of(3, head_layers=0, tail_layers=0, cycles=3)) == "123123123"
    assert order(config_of(4, head_layers=2, tail_layers=0, cycles=3)) == "12343434"
    assert order(config_of(4, head_layers=3, tail_layers=1, cycles=1)) == "1234"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["block", "layer"]))
def test_every_schedule(head: int, tail: int, shared: int, cycles: int, schedule: str) -> None:
    stored = head + shared + tail
    config = config_of(stored, head_layers=head, tail_layers=tail, cycles=cycles, schedule=schedule)
    steps = config.steps()
    assert [step.slot for step in steps] == list(range(config.num_hidden_layers))
    assert [(step.layer, step.cycle) for step in steps] == executions(config)
    assert config.num_hidden_layers == stored + (cycles - 1) * (stored - head - tail)
    assert (config.stored_layers, config.shared_layers) == (stored, shared)
    assert [config.is_shared(layer) for layer in range(stored)] == [False] * head + [True] * shared + [False] * tail


def test_layer_types_follow_the_unrolled_model() -> None:
    config = ZttConfig(base_config=base_config("gemma3"), cycles=2)
    sliding, full = "sliding_attention", "full_attention"
    assert config.layer_types == [sliding, full, sliding, full, sliding, full]
    assert config.base_config.layer_types == [sliding, full, sliding, full]


def test_the_base_configuration_answers_for_the_rest() -> None:
    config = config_of()
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (64, 32, 2)
    config.vocab_size = 70
    assert config.base_config.vocab_size == 70
    assert "vocab_size" not in config.__dict__
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = config.no_such_thing
    config.remark = "mine"
    assert config.remark == "mine"
    assert not hasattr(config.base_config, "remark")


def test_the_callers_configuration_is_left_alone() -> None:
    base = LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, attn_implementation="sdpa")
    before = base.to_dict()
    config = ZttConfig(base_config=base)
    config.vocab_size = 99
    AutoModelForCausalLM.from_config(ZttConfig(base_config=copy.deepcopy(base), head_layers=2))
    assert base.to_dict() == before
    assert base._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_written_down_and_read_again(family: str, tmp_path: Path) -> None:
    options = {
        "head_layers": 0,
        "tail_layers": 2,
        "cycles": 4,
        "schedule": "layer",
        "zero_rope": "none",
        "ffn_gate": True,
    }
    config = ZttConfig(base_config=base_config(family), **options)
    config.save_pretrained(tmp_path)
    for again in (
        AutoConfig.from_pretrained(tmp_path),
        ZttConfig.from_dict(config.to_dict()),
        ZttConfig(**config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(again) is ZttConfig
        assert type(again.base_config) is type(FAMILIES[family])
        assert {name: getattr(again, name) for name in options} == options
        assert again.steps() == config.steps()
        assert again.base_config.to_diff_dict() == config.base_config.to_diff_dict()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_from_a_read_configuration_is_the_same(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_tied_embeddings_follow_the_base_configuration() -> None:
    for tied in (True, False):
        model = tiny("llama", base=base_config("llama", tie_word_embeddings=tied))
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_resizing_the_vocabulary_is_written_into_the_base_configuration() -> None:
    model = tiny("llama")
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == model.config.base_config.vocab_size == 80
    assert model(tokens()).logits.shape == (2, 9, 80)
