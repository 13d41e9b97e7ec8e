"""`torch.compile` changes nothing: neither values nor gradients, in one graph wherever no token exits early.

The backend is `eager`, which runs what was traced as it is: what counts is that nothing was lost on the way.
`test_compile.py` runs this file in a process of its own: the compiler cannot look through checks of annotations.
"""

from typing import Any

import pytest
import torch
from transformers import CompileConfig, StaticCache

from tests.ztt.tiny import gap, tiny, tokens
from zerodraft import LatentExit, ZttForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what torch's compiler imports on first use
    # The compiler looks at every tensor that crosses from one graph to the next.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

PARTS = ("ffn_gate", "cycle_gates", "edge_zero_tokens", "input_injection", "cycle_scales")
EVERYTHING: dict[str, Any] = {"cycle_lora_rank": 2, "residual_streams": 2, **dict.fromkeys(PARTS, True)}
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "without zero tokens": {"cycle_lora_rank": 2, "zero_tokens": False},
    "layer by layer": {"schedule": "layer", "zero_rope": "relative", "ffn_gate": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def one_graph(model: ZttForCausalLM) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_values(options: dict[str, Any]) -> None:
    model, ids = tiny(**options), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours, theirs = (m(ids, attention_mask=mask, output_zero_mass=True) for m in (one_graph(model), model))
    assert gap(ours.logits[mask == 1], theirs.logits[mask == 1]) <= 1e-5
    if model.zero_tokens is not None:
        assert gap(ours.zero_mass, theirs.zero_mass) <= 1e-6


@torch.no_grad()
def test_values_of_another_family() -> None:
    model, ids = tiny("gemma3", **EVERYTHING), tokens()
    assert gap(one_graph(model)(ids).logits, model(ids).logits) <= 1e-5


@pytest.mark.parametrize(("family", "padded", "masks"), [("llama", False, 0), ("llama", True, 4), ("gemma3", False, 2)])
@torch.no_grad()
def test_no_mask_where_causality_is_all(family: str, padded: bool, masks: int) -> None:
    """No flash kernel takes a mask; half of the layers of this Gemma have windows shorter than the text."""
    model, ids = tiny(family, head_layers=0, tail_layers=0, cycles=1, num_hidden_layers=4), tokens(1, 12)
    given = {"attention_mask": torch.ones_like(ids)} if padded else {}
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.name.startswith(("_scaled_dot", "scaled_dot", "lse"))]
        found.extend(node.kwargs.get("attn_mask") is not None for node in calls)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert gap(compiled(ids, **given).logits, model(ids, **given).logits) <= 1e-5
    assert sum(found) == masks, (found, masks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    ids, found = tokens(), []
    for compiled in (False, True):
        model = tiny(**EVERYTHING).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        call = torch.compile(model, backend="eager", fullgraph=not checkpointing) if compiled else model
        loss = call(ids, labels=ids, cycle_weights=(1, 2, 3)).loss
        loss.backward()
        found.append((loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    (expected, gradients), (loss, ours) = found
    assert gap(loss, expected) <= 1e-6
    for name, gradient in gradients.items():
        assert gap(ours[name], gradient) <= 1e-5 * (1 + gradient.abs().max()), name


@torch.no_grad()
def test_a_static_cache() -> None:
    model, ids = tiny(cycles=2, **EVERYTHING), tokens()
    compiled, caches = one_graph(model), [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    for piece in ids.split([7, 1, 1], dim=1):
        ours, theirs = (m(piece, past_key_values=c).logits for m, c in zip((compiled, model), caches, strict=True))
        assert gap(ours, theirs) <= 1e-5


def test_generate_with_a_static_cache() -> None:
    model, ids = tiny(**EVERYTHING), tokens()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    settings = CompileConfig(backend="eager", fullgraph=True)
    settings._compile_all_devices = True  # transformers compiles on GPUs alone unless told otherwise
    compiled = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        cache_implementation="static",
        compile_config=settings,
    )
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@torch.no_grad()
def test_early_exit_in_several_graphs() -> None:
    """Who runs on depends on the values, so a graph ends there; what is computed stays the same."""
    model, ids = tiny(**EVERYTHING), tokens()
    compiled = torch.compile(model, backend="eager")
    ours, theirs = (m(ids, exit_rule=LatentExit(threshold=0.5)) for m in (compiled, model))
    assert torch.equal(ours.exit_depth, theirs.exit_depth)
    assert gap(ours.logits, theirs.logits) <= 1e-5
