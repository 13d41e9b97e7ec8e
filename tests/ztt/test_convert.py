"""Fewer weights for the same depth: the best fit where layers are shared, and what is refused in either direction."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.ztt.tiny import WINDOWS, base_config, logits, randomise, tiny_plain, unpositioned
from zerodraft import ZerodraftError, ZttForCausalLM
from zerodraft.ztt.convert import best_low_rank, from_base


def layer_weights(model: Any, layer: int, name: str = "mlp.up_proj.weight") -> Tensor:
    return model.get_parameter(f"{'base.' if isinstance(model, ZttForCausalLM) else ''}model.layers.{layer}.{name}")


def test_compressed_model_keeps_depth_and_saves_weights() -> None:
    base = tiny_plain(num_hidden_layers=6)
    small = from_base(base, mode="compress", cycles=2)
    assert small.config.num_hidden_layers == 6
    assert small.config.stored_layers == 4
    assert small.num_parameters() < base.num_parameters()
    assert torch.equal(layer_weights(small, 0), layer_weights(base, 0))
    assert torch.equal(layer_weights(small, 3), layer_weights(base, 5))


@pytest.mark.parametrize(("cycles", "picked"), [(2, [1, 4]), (4, [2]), (1, [1, 2, 3, 4])])
def test_stepwise_picks_evenly_spaced_layers(cycles: int, picked: list[int]) -> None:
    base = tiny_plain(num_hidden_layers=6)
    small = from_base(base, mode="compress", init="stepwise", cycles=cycles)
    for position, layer in enumerate(picked):
        assert torch.equal(layer_weights(small, 1 + position), layer_weights(base, layer))


@pytest.mark.parametrize(("schedule", "groups"), [("block", [[1, 3], [2, 4]]), ("layer", [[1, 2], [3, 4]])])
def test_average_is_over_the_layers_that_share(schedule: str, groups: list[list[int]]) -> None:
    base = tiny_plain(num_hidden_layers=6)
    small = from_base(base, mode="compress", init="average", cycles=2, schedule=schedule)
    for position, group in enumerate(groups):
        expected = sum(layer_weights(base, layer) for layer in group) / len(group)
        torch.testing.assert_close(layer_weights(small, 1 + position), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_svd_of_full_rank_is_the_base_model(family: str) -> None:
    base = AutoModelForCausalLM.from_config(unpositioned(family)).eval()
    randomise(base)
    with torch.no_grad():
        # LoRA carries matrices only: let all layers have the same norms and biases, so that nothing is lost
        for name, weight in base.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)

    def distance(init: str, rank: int) -> float:
        options = {"init": init, "cycles": 2, "cycle_lora_rank": rank, "zero_tokens": False}
        return float((logits(from_base(base, mode="compress", **options)) - logits(base)).abs().mean())

    assert distance("svd", 0) == distance("average", 0) == distance("average", 4)
    assert distance("svd", 32) < 1e-5 < distance("svd", 24) < distance("svd", 0)


def test_compressed_layers_are_not_fed_with_what_they_never_saw() -> None:
    options = {"mode": "compress", "cycles": 2, "input_injection": True, "cycle_scales": True}
    fed, plain = from_base(tiny_plain(), **options), from_base(tiny_plain(), mode="compress", cycles=2)
    plain.zero_tokens.load_state_dict(fed.zero_tokens.state_dict())
    assert torch.equal(logits(fed), logits(plain))
    assert from_base(tiny_plain(), input_injection_start=0.25, **options).input_injection.weight.tolist() == [0.25]


def test_low_rank_is_the_best_there_is() -> None:
    residual = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(residual)
    for rank in (1, 5, 12, 30):
        up, down = best_low_rank(residual, rank)
        assert up.shape == (12, rank)
        assert down.shape == (rank, 20)
        torch.testing.assert_close((residual - up @ down).norm(), singular[rank:].norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "smollm3"])
def test_layers_keep_their_kind(family: str) -> None:
    """Four layers of alternating kinds in two cycles of two: every shared layer stands for layers of one kind."""
    options = {"head_layers": 0, "tail_layers": 0, "cycles": 2}
    small = from_base(tiny_plain(family), mode="compress", init="average", **options)
    stored: Any = small.config.base_config
    if family == "gemma3":
        assert stored.layer_types == WINDOWS[:2]
        assert small.config.layer_types == WINDOWS
    else:
        assert stored.no_rope_layers == [1, 0]
    assert torch.isfinite(logits(small)).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "depen"}, "did you mean 'deepen'"),
        ({"mode": "compress", "init": "avarage"}, "did you mean 'average'"),
        ({"zero_token": True}, "did you mean 'zero_tokens'"),
        ({"lora": 3}, "no setting 'lora'"),
        ({"head_layers": 2, "tail_layers": 2}, "leave no layer to cycle"),
        ({"head_layers": -1}, "head_layers=-1 must be"),
        ({"cycles": 0}, "cycles=0 must be"),
        ({"mode": "compress", "cycles": 0}, "cycles=0 must be"),
        ({"mode": "compress", "cycles": 3}, r"cycles can be 2; with these cycles, head_layers \+ tail_layers can be 1"),
        ({"mode": "compress", "head_layers": 2, "tail_layers": 2}, "leave no layer to cycle"),
        ({"cycle_gates": False}, "cycle_gates=False would change"),
        ({"input_injection": True, "input_injection_start": 0.5}, "input_injection_start=0.5 would change"),
        ({"zero_token_start": 1}, "zero_token_start=1 would change"),
        ({"edge_zero_tokens": True}, "edge_zero_tokens=True would change"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ZerodraftError, match=sentence):
        from_base(tiny_plain(), **options)


def bert() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    return BertLMHeadModel(BertConfig(**sizes, vocab_size=64, is_decoder=True))


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


def headless() -> Any:
    return AutoModel.from_config(base_config("llama"))


def with_nan() -> Any:
    model = tiny_plain()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    return model


def with_adapter() -> Any:
    model = tiny_plain()
    model.model.layers[2].mlp.add_module("adapter", torch.nn.Linear(32, 32))
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (bert, "BertLMHeadModel cannot be cycled"),
        (t5, "has an encoder"),
        (headless, "has no LM head"),
        (with_nan, r"'model\.layers\.2\.mlp\.up_proj\.weight' of 'LlamaForCausalLM' holds NaN"),
        (with_adapter, "are not those of a plain LlamaForCausalLM"),
        (lambda: from_base(tiny_plain()), "is a Zero Token Transformer already"),
        (lambda: torch.nn.Linear(2, 2), "is not a transformers model"),
        (lambda: "no/such/model", "'no/such/model' is not a model directory"),
    ],
    ids=["bert", "t5", "headless", "nan", "adapter", "ztt", "module", "name"],
)
def test_models_that_cannot_be_converted(make: Any, sentence: str) -> None:
    with pytest.raises(ZerodraftError, match=sentence):
        from_base(make())
