"""The idea in one file computes what the real model computes."""

import pytest
import torch
from torch import Tensor

from tests.ztt.test_exits import splitting
from tests.ztt.tiny import LAYERS, SIZES, gap, tiny, tokens
from zerodraft import ZeroMassExit, ZttForCausalLM
from zerodraft.ztt.idea import Size, ZeroTokenTransformer

SHAPES = [(1, 1, 3), (0, 1, 2), (1, 0, 4), (0, 0, 1)]


def idea_of(model: ZttForCausalLM) -> ZeroTokenTransformer:
    """The same weights."""
    config = model.config
    size = Size(
        vocab=SIZES["vocab_size"],
        hidden=SIZES["hidden_size"],
        inner=SIZES["intermediate_size"],
        layers=LAYERS,
        heads=SIZES["num_attention_heads"],
        kv_heads=SIZES["num_key_value_heads"],
        head_layers=config.head_layers,
        tail_layers=config.tail_layers,
        cycles=config.cycles,
    )
    idea = ZeroTokenTransformer(size)
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        plain = name.removeprefix("base.").removeprefix("model.")
        weights["zero_keys" if name == "zero_tokens.keys" else plain] = weight
    idea.load_state_dict(weights)
    return idea


@pytest.mark.parametrize(("head", "tail", "cycles"), SHAPES)
@torch.no_grad()
def test_logits_are_the_model_s(head: int, tail: int, cycles: int) -> None:
    model = tiny("llama", head_layers=head, tail_layers=tail, cycles=cycles)
    logits, depth = idea_of(model)(tokens())
    assert gap(logits, model(tokens()).logits) <= 1e-5
    assert (depth == cycles).all()


@pytest.mark.parametrize(("head", "tail", "cycles"), SHAPES[:3])
@torch.no_grad()
def test_tokens_leave_where_the_model_s_do(head: int, tail: int, cycles: int) -> None:
    model, ids = tiny("llama", head_layers=head, tail_layers=tail, cycles=cycles), tokens(3, 12)
    rule = splitting(model)
    assert isinstance(rule, ZeroMassExit)
    out = model(ids, exit_rule=rule)
    logits, depth = idea_of(model)(ids, rule.threshold)
    assert len(depth.unique()) > 1
    assert torch.equal(depth, out.exit_depth)
    assert gap(logits, out.logits) <= 1e-5
