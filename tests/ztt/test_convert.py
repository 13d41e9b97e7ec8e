"""Conversion from and to plain models: exact where it can be, the best fit where layers are shared, else refused."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.ztt.tiny import FAMILIES, LAYERS, WINDOWS, base_config, randomise, tiny_plain, tokens
from zerodraft import FixedExit, ZerodraftError, ZttConfig, ZttForCausalLM
from zerodraft.targets import resolve
from zerodraft.ztt.convert import best_low_rank, from_base, to_base
from zerodraft.ztt.loading import load_pretrained
from zerodraft.ztt.lora import matrix, projections


def build(layers: int = LAYERS) -> Any:
    return tiny_plain("llama", num_hidden_layers=layers)


def unpositioned(family: str) -> Any:
    """The family's configuration without what depends on a layer's position."""
    changes = {"scale_attn_by_inverse_layer_idx": False} if family == "gpt2" else {}
    return base_config(family, **changes)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tokens()).logits


@torch.no_grad()
def open_gates(model: ZttForCausalLM, value: float) -> None:
    assert model.cycle_gates is not None
    model.cycle_gates.fill_(value)


# -- deepen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_deepened_model_starts_as_the_base_model(family: str) -> None:
    base = tiny_plain(family)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = base.config.to_dict()
    deep = from_base(base, cycles=3, cycle_lora_rank=2)
    assert deep.config.num_hidden_layers == 1 + 3 * (LAYERS - 2) + 1
    assert torch.equal(logits(deep), logits(base))
    prompt = tokens()
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    generated: Any = deep.generate(prompt, **greedy)
    assert torch.equal(generated, base.generate(prompt, **greedy))
    # the caller's model is as it was, and shares no memory with the new one
    assert base.config.to_dict() == config
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    ours = {weight.data_ptr() for weight in deep.parameters()}
    assert ours.isdisjoint(weight.data_ptr() for weight in base.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "layer"},
        {"head_layers": 0, "tail_layers": 0},
        {"zero_rope": "none"},
        {"zero_tokens": False},
        {"ffn_gate": True},
        {"cycles": 1},
    ],
    ids=str,
)
def test_every_deepening_is_exact(settings: dict[str, Any]) -> None:
    base = build()
    assert torch.equal(logits(from_base(base, **settings)), logits(base))


def test_deepened_model_learns_through_its_gates() -> None:
    deep = from_base(build(), cycles=2).train()
    inputs = tokens()
    deep(inputs, labels=inputs).loss.backward()
    assert deep.cycle_gates is not None
    assert deep.cycle_gates.grad is not None
    assert bool((deep.cycle_gates.grad != 0).all())
    open_gates(deep, 0.5)
    assert not torch.allclose(logits(deep), logits(build()), atol=1e-3)


def test_dtype_and_generation_settings_are_taken_over() -> None:
    base = build().to(torch.bfloat16)
    base.generation_config.max_new_tokens = 5
    deep = from_base(base)
    assert {weight.dtype for weight in deep.parameters()} == {torch.bfloat16}
    assert deep.generation_config is not None
    assert deep.generation_config.max_new_tokens == 5
    assert deep.generation_config is not base.generation_config
    assert torch.equal(logits(deep), logits(base))


def test_from_a_directory(tmp_path: Path) -> None:
    base = build()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(ZttForCausalLM.from_base(tmp_path)), logits(base))


@pytest.mark.real_model
def test_deepened_smollm2_is_smollm2() -> None:
    """Logits and greedy text bit for bit; the loss falls as soon as the gates may move."""
    base: Any = load_pretrained(AutoModelForCausalLM, resolve("smollm2"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2"))
    deep: Any = ZttForCausalLM.from_base(base, cycles=2)
    assert deep.config.num_hidden_layers == 58
    prompt = tokenizer("The Seine runs through Paris and into the", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(deep(**prompt).logits, base(**prompt).logits)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(deep.generate(**prompt, **greedy), base.generate(**prompt, **greedy))
    before = deep(**prompt, labels=prompt["input_ids"]).loss
    before.backward()
    with torch.no_grad():
        deep.cycle_gates -= 1e-3 * deep.cycle_gates.grad.sign()
        assert deep(**prompt, labels=prompt["input_ids"]).loss < before


# -- compress -----------------------------------------------------------------------------------------------------


def layer_weights(model: Any, layer: int, name: str = "mlp.up_proj.weight") -> Tensor:
    return model.get_parameter(f"{'base.' if isinstance(model, ZttForCausalLM) else ''}model.layers.{layer}.{name}")


def test_compressed_model_keeps_depth_and_saves_weights() -> None:
    base = build(6)
    small = from_base(base, mode="compress", cycles=2)
    assert small.config.num_hidden_layers == 6
    assert small.config.stored_layers == 4
    assert small.num_parameters() < base.num_parameters()
    assert torch.equal(layer_weights(small, 0), layer_weights(base, 0))
    assert torch.equal(layer_weights(small, 3), layer_weights(base, 5))


@pytest.mark.parametrize(("cycles", "picked"), [(2, [1, 4]), (4, [2]), (1, [1, 2, 3, 4])])
def test_stepwise_picks_evenly_spaced_layers(cycles: int, picked: list[int]) -> None:
    base = build(6)
    small = from_base(base, mode="compress", init="stepwise", cycles=cycles)
    for position, layer in enumerate(picked):
        assert torch.equal(layer_weights(small, 1 + position), layer_weights(base, layer))


@pytest.mark.parametrize(("schedule", "groups"), [("block", [[1, 3], [2, 4]]), ("layer", [[1, 2], [3, 4]])])
def test_average_is_over_the_layers_that_share(schedule: str, groups: list[list[int]]) -> None:
    base = build(6)
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


# -- LoRA ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def train_lora(model: ZttForCausalLM) -> None:
    assert model.cycle_lora is not None
    for weight in model.cycle_lora.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_adds_another_delta_in_each_cycle(family: str) -> None:
    """Equal to the unrolled plain model whose projections have the deltas added to their weights."""
    plain = AutoModelForCausalLM.from_config(unpositioned(family)).eval()
    randomise(plain)
    model = from_base(plain, mode="compress", cycles=2, cycle_lora_rank=3, zero_tokens=False)
    start = logits(model)
    train_lora(model)
    assert not torch.allclose(logits(model), start, atol=1e-3)
    assert model.cycle_lora is not None
    for name, projection in projections(model.layers[1]):
        first, second = (model.cycle_lora.delta(0, name).weight(cycle) for cycle in range(2))
        assert first.shape == matrix(projection).shape
        assert not torch.equal(first, second)
    torch.testing.assert_close(logits(to_base(model, unroll=True)), logits(model), atol=1e-5, rtol=1e-5)


def test_trained_lora_survives_saving(tmp_path: Path) -> None:
    model = from_base(build(), cycles=2, cycle_lora_rank=3)
    train_lora(model)
    open_gates(model, 0.7)
    model.save_pretrained(tmp_path)
    again = load_pretrained(AutoModelForCausalLM, tmp_path)
    assert isinstance(again, ZttForCausalLM)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_gradients_under_checkpointing(reentrant: bool) -> None:
    model = from_base(build(), cycles=3, cycle_lora_rank=2).train()
    train_lora(model)
    open_gates(model, 0.5)
    inputs = tokens()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(inputs, labels=inputs).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert any(name.startswith("cycle_lora") and bool((grad != 0).any()) for name, grad in plain.items())
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 4])
@torch.no_grad()
def test_exited_tokens_get_the_keys_of_every_cycle(depth: int) -> None:
    """Cycles with LoRA of their own make other keys of the same frozen state, also when nobody runs any more."""
    model = from_base(build(), cycles=4, cycle_lora_rank=2)
    randomise(model)
    inputs = tokens()
    exited: Any = model(inputs, exit_rule=FixedExit(cycles=depth))
    oracle: Any = model(inputs, exit_depth=torch.full_like(inputs, depth))
    for ours, theirs in zip(exited.past_key_values.layers, oracle.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)


# -- back to the base family --------------------------------------------------------------------------------------


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
    base = build()
    deep = from_base(base, cycles=3)
    plain = to_base(deep, unroll=True)
    assert plain.config.num_hidden_layers == LAYERS
    assert torch.equal(logits(plain), logits(base))
    bare = from_base(base, cycles=2, zero_tokens=False)
    assert bare.cycle_gates is not None
    with torch.no_grad():
        bare.cycle_gates[0, 1] = 1
    plain = to_base(bare, unroll=True)
    assert plain.config.num_hidden_layers == LAYERS + 1
    torch.testing.assert_close(logits(plain), logits(bare), atol=1e-5, rtol=1e-5)


def test_unrolled_model_can_be_saved_and_loaded_as_plain(tmp_path: Path) -> None:
    model = from_base(build(), mode="compress", cycles=2, zero_tokens=False)
    to_base(model, unroll=True).save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs the peft extra")
    page = Path(__file__).parents[2] / "docs" / "convert.md"
    monkeypatch.chdir(tmp_path)
    build(6).save_pretrained("my-model")
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "convert"})
    tuned: Any = load_pretrained(AutoModelForCausalLM, tmp_path / "my-ztt-tuned")
    assert bool((tuned.cycle_gates != 0).all())


# -- refusals: one clear sentence ---------------------------------------------------------------------------------


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
        ({"zero_token_start": 1}, "zero_token_start=1 would change"),
        ({"edge_zero_tokens": True}, "edge_zero_tokens=True would change"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ZerodraftError, match=sentence):
        from_base(build(), **options)


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
    model = build()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    return model


def with_adapter() -> Any:
    model = build()
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
        (lambda: from_base(build()), "is a Zero Token Transformer already"),
        (lambda: torch.nn.Linear(2, 2), "is no transformers model"),
        (lambda: "no/such/model", "'no/such/model' is no model directory"),
    ],
    ids=["bert", "t5", "headless", "nan", "adapter", "ztt", "module", "name"],
)
def test_models_that_cannot_be_converted(make: Any, sentence: str) -> None:
    with pytest.raises(ZerodraftError, match=sentence):
        from_base(make())


def test_what_a_plain_model_cannot_compute() -> None:
    deep = from_base(build(), cycles=2)
    with pytest.raises(ZerodraftError, match="unroll=True gives"):
        to_base(deep)
    open_gates(deep, 1.0)
    with pytest.raises(ZerodraftError, match="attends to a zero token in cycle 2"):
        to_base(deep, unroll=True)
    bare = from_base(build(), cycles=2, zero_tokens=False)
    open_gates(bare, 0.25)
    with pytest.raises(ZerodraftError, match=r"gate of layer 1 in cycle 2 is 0\.25"):
        to_base(bare, unroll=True)


def test_layers_that_know_their_position_are_not_unrolled() -> None:
    config = ZttConfig(base_config=base_config("gpt2"), cycles=2, zero_tokens=False)
    assert config.scale_attn_by_inverse_layer_idx
    model = ZttForCausalLM(config)
    randomise(model)
    with pytest.raises(ZerodraftError, match="depend on their position"):
        to_base(model, unroll=True)


@pytest.mark.parametrize("damage", ["truncated", "missing", "misshapen", "nan", "config"])
def test_damaged_checkpoints(tmp_path: Path, damage: str) -> None:
    from_base(build(), cycles=2).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "missing":
        del weights["zero_tokens.keys"]
    elif damage == "misshapen":
        weights["zero_tokens.keys"] = torch.zeros(7, 1, 2, 8)
    elif damage == "nan":
        weights["cycle_gates"][0, 0] = float("nan")
    else:
        (tmp_path / "config.json").write_text("{")
    if damage in ("missing", "misshapen", "nan"):
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ZerodraftError) as raised:
        load_pretrained(AutoModelForCausalLM, tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)
