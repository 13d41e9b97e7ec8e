"""What transformers demands of every model class, checked anew after the contracts of its `ModelTesterMixin`.

A Zero Token Transformer keeps what its family keeps. Not meant for it, and so not here:

* Feed-forward chunking, head masks and pruning, position-vector resizing: none of the families has them any more.
* Model and tensor parallelism, offload to CPU and disk, DeepSpeed, FlashAttention: they need an accelerator.
* `model.config` being one object with that of the submodules: the family inside has a copy that names our attention.
* A first pass after `torch.compile`: `test_compile.py`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.ztt.tiny import VOCABULARY, base_config, gap, left_padded, tiny, tokens
from zerodraft import ZttConfig, ZttForCausalLM, ZttModel

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")
PARTS = ("cycle_gates", "edge_zero_tokens", "input_injection", "cycle_scales")
FULL: dict[str, Any] = {**dict.fromkeys(PARTS, True), "residual_streams": 2}

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def config_of(family: str, **changes: Any) -> ZttConfig:
    return ZttConfig(base_config=base_config(family, **changes), cycles=3, **FULL)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- saving and loading -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_load(family: str, tmp_path: Path) -> None:
    model = tiny(family, **FULL)
    for part in (model, ZttModel(model.config).eval()):
        part.save_pretrained(tmp_path / type(part).__name__, max_shard_size="20KB")
        assert len(list((tmp_path / type(part).__name__).glob("*.safetensors"))) > 1
        again, info = type(part).from_pretrained(tmp_path / type(part).__name__, output_loading_info=True)
        assert not any(info.values()), info
        assert not again.training
        assert gap(again(tokens())[0], part(tokens())[0]) == 0


def test_load_from_a_state_dict(family: str) -> None:
    model = tiny(family, **FULL)
    again = ZttForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(model).items())


def test_missing_weights_are_drawn_as_in_a_new_model(family: str) -> None:
    config = config_of(family)
    torch.manual_seed(3)
    new = weights(ZttForCausalLM(config))
    layers = {name: value for name, value in new.items() if ".layers." in name or ".h." in name}
    for given in (layers, {}):
        model = ZttForCausalLM.from_pretrained(None, config=config, state_dict=given)
        for name, value in model.state_dict().items():
            assert value.isfinite().all(), name
            assert value.float().std() == pytest.approx(float(new[name].float().std()), rel=0.3, abs=1e-6), name


def test_shapes_that_do_not_match(family: str, tmp_path: Path) -> None:
    tiny(family, **FULL).save_pretrained(tmp_path)
    wider = config_of(family, vocab_size=VOCABULARY + 10)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ZttForCausalLM.from_pretrained(tmp_path, config=wider)
    model = ZttForCausalLM.from_pretrained(tmp_path, config=wider, ignore_mismatched_sizes=True)
    assert model(tokens()).logits.shape[-1] == VOCABULARY + 10


def test_places_and_types(family: str, tmp_path: Path) -> None:
    model = tiny(family, **FULL)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert all(p.is_meta for p in ZttForCausalLM(model.config).parameters())
    assert ZttForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).device.type == "cpu"
    half = ZttForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert gap(half(tokens()).logits, model(tokens()).logits) < 1.0
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


# -- initialisation -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_initialisation(family: str) -> None:
    torch.manual_seed(0)
    model = ZttForCausalLM(config_of(family))
    std = model.config.initializer_range
    assert float(model.zero_tokens.keys.std()) == pytest.approx(std, rel=0.3)
    assert float(model.zero_tokens.edge_keys.std()) == pytest.approx(std, rel=0.3)
    assert not model.cycle_gates.weight.any()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert p.requires_grad, name
    before = weights(model)
    torch.manual_seed(0)
    again = ZttForCausalLM(model.config)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_determinism(family: str) -> None:
    model = tiny(family, **FULL)
    assert gap(model(tokens()).logits, model(tokens()).logits) == 0
    assert model.main_input_name == "input_ids"
    assert gap(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits) == 0


# -- embeddings ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_get_and_set_embeddings(family: str) -> None:
    model, ids = tiny(family, **FULL), tokens()
    embedding = model.get_input_embeddings()
    assert embedding is model.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    expected = model(ids).logits
    # what a family does to its embeddings (Gemma scales them) belongs to the module
    given = model(inputs_embeds=embedding(ids)).logits
    assert gap(given, expected) < 1e-5
    blank = copy.deepcopy(embedding)
    blank.weight.zero_()
    model.set_input_embeddings(blank)
    assert model.get_input_embeddings() is blank
    assert model.model.get_input_embeddings() is blank
    assert gap(model(ids).logits, expected) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_resize_token_embeddings(family: str, tied: bool, tmp_path: Path) -> None:
    model, ids = tiny(family, base=base_config(family, tie_word_embeddings=tied), **FULL), tokens()
    before = model(ids).logits
    for size in (VOCABULARY + 10, VOCABULARY):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size == model.get_input_embeddings().weight.shape[0]
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        assert model(ids).logits.shape[-1] == size
        assert gap(model(ids).logits[..., :VOCABULARY], before) == 0
        loss = model(ids, labels=ids).loss
        assert loss.isfinite()
        model.save_pretrained(tmp_path / str(size))
        assert gap(ZttForCausalLM.from_pretrained(tmp_path / str(size))(ids, labels=ids).loss, loss) == 0
    assert model.resize_token_embeddings(VOCABULARY + 3, pad_to_multiple_of=16).weight.shape[0] == VOCABULARY + 16


@torch.no_grad()
def test_tied_weights(family: str, tmp_path: Path) -> None:
    model = tiny(family, base=base_config(family, tie_word_embeddings=True), **FULL)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tied = set(model.all_tied_weights_keys)
    assert {name.rsplit(".", 1)[0] for name in tied} <= {name for name, _ in model.named_modules()}
    assert len(tied) == 1
    model.save_pretrained(tmp_path)
    again, info = ZttForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    again.get_input_embeddings().weight.mul_(2)
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)


# -- outputs ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_as_dict_and_tuple(family: str) -> None:
    model = tiny(family, **FULL)
    model.set_attn_implementation("eager")
    batch = left_padded(list(tokens(2, 6)))
    for options in ({}, {"labels": batch["input_ids"]}, {"output_hidden_states": True, "output_attentions": True}):
        as_dict = model(**batch, use_cache=False, **options)
        as_tuple = model(**batch, use_cache=False, return_dict=False, **options)
        assert len(as_tuple) == len(as_dict.to_tuple())
        for one, other in zip(as_tuple, as_dict.to_tuple(), strict=True):
            for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (one, other)), strict=True):
                assert gap(a, b) == 0
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


@torch.no_grad()
def test_attentions_and_hidden_states_by_argument_and_by_configuration(family: str) -> None:
    model, ids = tiny(family, **FULL), tokens()
    model.set_attn_implementation("eager")
    by_argument = model(ids, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = model.config.output_attentions = True
    for out in (by_argument, model(ids)):
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert {tuple(state.shape) for state in out.hidden_states} == {(*ids.shape, 32)}
        assert len(out.attentions) == model.config.num_hidden_layers
        assert {tuple(a.shape) for a in out.attentions} == {(2, 4, 9, 9)}
        assert all(bool((a.triu(1) == 0).all()) for a in out.attentions)
    assert model(ids, output_hidden_states=False, output_attentions=False).attentions is None


def test_gradients_of_states_and_attentions(family: str) -> None:
    model, ids = tiny(family, **FULL), tokens()
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    kept = (out.hidden_states[0], out.hidden_states[4], out.attentions[0], out.attentions[4])
    for value in kept:
        value.retain_grad()
    out.logits.sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in kept)


@torch.no_grad()
def test_implementations_of_attention_agree(family: str) -> None:
    model = tiny(family, **FULL)
    batch = left_padded([row[: 9 - i] for i, row in enumerate(tokens(3, 9))])
    real = batch["attention_mask"].bool()
    expected = {}
    for name in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        expected[name] = model(**batch).logits[real]
    assert gap(expected["sdpa"], expected["eager"]) < 2e-5
    config = copy.deepcopy(model.config)
    loaded = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    loaded.load_state_dict(model.state_dict())
    assert gap(loaded(**batch).logits[real], expected["eager"]) < 1e-6


@torch.no_grad()
def test_batches(family: str) -> None:
    model, ids = tiny(family, **FULL), tokens(3, 8)
    whole = model(ids, output_hidden_states=True)
    for row in range(3):
        alone = model(ids[row : row + 1], output_hidden_states=True)
        assert gap(alone.logits[0], whole.logits[row]) < 1e-5
        for ours, theirs in zip(alone.hidden_states, whole.hidden_states, strict=True):
            assert gap(ours[0], theirs[row]) < 1e-4


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_training(family: str, checkpointing: dict[str, bool] | None) -> None:
    model, ids = tiny(family, **FULL).train(), tokens()
    assert not model.is_gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(bool(grad.any()) for grad in expected.values())
    if checkpointing is None:
        return
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    assert model.is_gradient_checkpointing
    assert sum(getattr(layer, "gradient_checkpointing", False) for layer in model.layers) == len(model.layers)
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_it_learns_a_batch_by_heart(family: str) -> None:
    torch.manual_seed(0)
    model, ids = ZttForCausalLM(config_of(family)).train(), tokens(2, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
