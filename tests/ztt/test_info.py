"""Sizes and costs: what is predicted is what torch counts, in every family, with and without early exit."""

import json
from typing import Any

import pytest
import torch

from tests.ztt.tiny import FAMILIES, LAYERS, base_config, tiny, tokens
from zerodraft import FixedExit, ZerodraftError, ZttConfig
from zerodraft.ztt.exits import CycleOutput
from zerodraft.ztt.flops import count_flops
from zerodraft.ztt.info import model_info, predicted_flops


class RandomExit:
    """Stops a random half of the tokens after each cycle."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, out: CycleOutput) -> torch.Tensor:
        return torch.rand(len(out.hidden), generator=self.generator) < 0.5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_flops_of_prefill_and_decoding(family: str) -> None:
    model, inputs = tiny(family), tokens(2, 7)
    with count_flops() as counted:
        out: Any = model(inputs)
    assert counted.total == predicted_flops(model, torch.full((2, 7), 3))
    with count_flops() as counted:
        model(inputs[:, :1], past_key_values=out.past_key_values)
    assert counted.total == predicted_flops(model, torch.full((2, 1), 3), past=7)
    if family not in ("mistral", "gemma3"):
        # a single token over the whole context: the figure that `zerodraft info` shows
        assert counted.total == 2 * model_info(model, context=8).flops_per_token[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("policy", ["propagate", "latest"])
@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_flops_with_early_exit(family: str, policy: Any, rank: int) -> None:
    model, inputs = tiny(family, cycles=4, cycle_lora_rank=rank), tokens(3, 9)
    with count_flops() as counted:
        out: Any = model(inputs, exit_rule=RandomExit(), exit_policy=policy, logits_to_keep=1)
    assert sorted(out.exit_depth.unique().tolist()) == [1, 2, 3, 4]
    assert counted.total == predicted_flops(model, out.exit_depth, logits=1, policy=policy)
    assert counted.total < predicted_flops(model, torch.full((3, 9), 4), logits=1)


@torch.no_grad()
def test_flops_of_a_token_by_cycles() -> None:
    model = tiny(cycles=3)
    out: Any = model(tokens(1, 7))
    by_cycles = model_info(model, context=8).flops_per_token
    assert by_cycles[0] < by_cycles[1] < by_cycles[2]
    with count_flops() as counted:
        model(tokens(1, 1), past_key_values=out.past_key_values, exit_rule=FixedExit(cycles=1))
    # beyond its one cycle an exited token only leaves keys and values for those that come after it
    frozen = counted.total - by_cycles[0]
    assert frozen == predicted_flops(model, torch.tensor([[1]]), past=7) - by_cycles[0]
    assert 0 < frozen < by_cycles[1] - by_cycles[0]


def test_parameters_by_part() -> None:
    parts = ("cycle_gates", "edge_zero_tokens", "input_injection", "cycle_scales")
    model = tiny(cycles=3, cycle_lora_rank=2, residual_streams=2, **dict.fromkeys(parts, True))
    parameters = model_info(model).parameters
    layer = sum(weight.numel() for weight in model.layers[0].parameters())
    assert parameters["head"] == parameters["tail"] == layer
    assert parameters["shared"] == (LAYERS - 2) * layer
    assert parameters["embedding"] == 64 * 32
    assert parameters["output"] == 32 + 64 * 32
    assert parameters["cycle_gates"] == 2 * (LAYERS - 2)
    assert (parameters["input_injection"], parameters["cycle_scales"]) == (2, 3)
    assert parameters["residual_streams"] == 2 * (6 * (32 + 1) + 3)
    assert parameters["zero_tokens"] == (3 * (LAYERS - 2) + 2) * 2 * 8
    assert parameters["total"] == model.num_parameters() == sum(parameters.values()) - parameters["total"]


def test_tied_weights_count_once() -> None:
    tied = tiny(base=base_config("llama", tie_word_embeddings=True))
    parameters = model_info(tied).parameters
    assert parameters["embedding"] == 64 * 32
    assert parameters["output"] == 32
    assert parameters["total"] == tied.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_alone_tells_the_same(family: str) -> None:
    model = tiny(family)
    info = model_info(model)
    assert model_info(model.config) == info
    assert info.parameters["total"] == model.num_parameters()
    assert info.depth == 1 + 3 * (LAYERS - 2) + 1
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_cache_bytes(family: str) -> None:
    model = tiny(family)
    cache: Any = model(tokens(1, 5)).past_key_values
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert model_info(model).kv_bytes_per_token == stored // 5
    assert model_info(model.bfloat16()).kv_bytes_per_token == stored // 10


def test_window_bounds_what_a_token_attends_to() -> None:
    config = ZttConfig(base_config=base_config("mistral"), zero_tokens=False)
    costs = [model_info(config, context=context).flops_per_token[0] for context in (4, 5, 50)]
    assert costs[0] < costs[1] == costs[2]


def test_context_must_be_positive() -> None:
    with pytest.raises(ZerodraftError, match="context=0 must be at least 1"):
        model_info(tiny(), context=0)
