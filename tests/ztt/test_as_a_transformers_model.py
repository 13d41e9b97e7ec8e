"""What programs that know only transformers ask of a causal language model: its decoder, its settings, its losses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from tests.ztt.tiny import FAMILIES, base_config, gap, randomise, tiny, tiny_plain, tokens
from zerodraft import FixedExit, ZerodraftError, ZttConfig, ZttForCausalLM, ZttModel
from zerodraft.ztt.convert import from_base, to_base

# -- the decoder without the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_decoder_runs_the_cycles(family: str) -> None:
    model, ids = tiny(family, cycle_gates=True, cycle_lora_rank=2), tokens()
    states = model(ids, output_hidden_states=True).hidden_states
    for decoder in (model.base_model, model.get_decoder(), model.model):
        assert isinstance(decoder, ZttModel)
        out = decoder(ids, output_hidden_states=True)
        assert gap(out.last_hidden_state, states[-1]) == 0
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert gap(decoder(ids, cycles=1).last_hidden_state, states[-1]) > 1e-3
    cached = model.model(ids[:, 5:], past_key_values=model.model(ids[:, :5], use_cache=True).past_key_values)
    assert gap(cached.last_hidden_state, states[-1][:, 5:]) < 1e-5


def test_the_decoder_has_no_weights_of_its_own() -> None:
    model = tiny(cycle_gates=True, cycle_lora_rank=2)
    whole = {id(p) for p in model.parameters()}
    decoder = model.model
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    assert {id(p) for p in decoder.parameters()} == whole - head
    assert not any(isinstance(module, ZttModel) for module in model.modules())
    assert decoder is model.model
    assert decoder.get_decoder() is decoder
    assert not decoder.train().training or not model.model.training  # the mode is the model's
    twin = copy.deepcopy(model)
    assert twin.model.layers[0] is twin.layers[0]
    assert twin.model.layers[0] is not model.layers[0]
    model.cycle_gates = None
    assert model.model.cycle_gates is None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradients_through_the_decoder_are_the_models() -> None:
    model, ids = tiny(cycle_gates=True).train(), tokens()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    head = model.get_output_embeddings()
    assert head is not None
    model.loss_function(head(model.model(ids).last_hidden_state), ids, model.config.vocab_size).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@torch.no_grad()
def test_with_and_without_the_head_load_each_others_files(family: str, tmp_path: Path) -> None:
    model, ids = tiny(family, cycle_gates=True, edge_zero_tokens=True), tokens()
    expected = model.model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    decoder: Any = AutoModel.from_pretrained(tmp_path / "whole")
    assert gap(decoder(ids).last_hidden_state, expected) == 0
    for name, saved in (("built", decoder), ("shared", model.model)):
        saved.save_pretrained(tmp_path / name)
        whole, info = ZttForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert {key.split(".")[1] for key in info["missing_keys"]} <= {"lm_head", "embed_out"}
        assert gap(whole.model(ids).last_hidden_state, expected) == 0


# -- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["cycle_gates", "cycle_gates.weight"])
def test_files_may_name_the_gates_either_way(key: str, tmp_path: Path) -> None:
    model = tiny(cycle_gates=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert "cycle_gates" in weights, "older versions read what this one writes"
    weights[key] = weights.pop("cycle_gates")
    save_file(weights, file, metadata={"format": "pt"})
    for loaded in (ZttForCausalLM.from_pretrained(tmp_path), ZttModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.cycle_gates.weight, model.cycle_gates.weight)
    fresh = ZttForCausalLM(model.config)
    fresh.load_state_dict(weights)
    assert torch.equal(fresh.cycle_gates.weight, model.cycle_gates.weight)


# -- configuration and settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_stops_where_the_family_does(family: str) -> None:
    base = base_config(family, bos_token_id=5, eos_token_id=6, pad_token_id=7)
    ours = ZttForCausalLM(ZttConfig(base_config=base)).generation_config
    theirs = AutoModelForCausalLM.from_config(base).generation_config
    assert ours.to_dict() == theirs.to_dict()
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (5, 6, 7)


def test_what_is_no_zero_token_transformer_is_refused(tmp_path: Path) -> None:
    plain = tiny_plain("gpt2")
    plain.save_pretrained(tmp_path)
    for load in (ZttForCausalLM, ZttModel, ZttConfig):
        with pytest.raises(ZerodraftError, match=r"a plain gpt2 model.*ZttForCausalLM\.from_base"):
            load.from_pretrained(tmp_path)
    for build in (ZttForCausalLM, ZttModel):
        with pytest.raises(ZerodraftError, match="needs a ZttConfig, not GPT2Config"):
            build(plain.config)
    with pytest.raises(ZerodraftError, match=r"nothing.*fits"):
        ZttForCausalLM.from_pretrained(tmp_path, config=ZttConfig(base_config=plain.config))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_post_init_leaves_a_finished_model_alone(family: str) -> None:
    base = tiny_plain(family)
    converted = from_base(base, cycles=3, edge_zero_tokens=False, cycle_lora_rank=2)
    compressed = from_base(base, mode="compress", cycles=2, cycle_lora_rank=2, init="svd")
    plain = to_base(from_base(base, cycles=2, zero_tokens=False), unroll=True)
    for model in (converted, compressed, plain, tiny(family, cycle_gates=True)):
        randomise(model)
        before = copy.deepcopy(dict(model.state_dict(), **dict(model.named_buffers())))
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        state = torch.get_rng_state()
        model.post_init()
        assert torch.equal(torch.get_rng_state(), state)
        after = dict(model.state_dict(), **dict(model.named_buffers()))
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


# -- losses and outputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"shift_labels": tokens(seed=5)},
        {"ignore_index": int(tokens()[0, 3])},
        {"num_items_in_batch": torch.tensor(7)},
        {"shift_labels": tokens(seed=6), "ignore_index": 9, "num_items_in_batch": 5},
    ],
    ids=lambda arguments: "+".join(arguments),
)
@torch.no_grad()
def test_arguments_of_the_loss(arguments: dict[str, Any]) -> None:
    plain, ids = tiny_plain(), tokens()
    model = from_base(plain, cycles=2)
    expected = plain(ids, labels=ids, **arguments).loss
    assert gap(model(ids, labels=ids, **arguments).loss, expected) < 1e-6
    assert gap(model(ids, labels=ids, cycle_weights=(1, 3), **arguments).cycle_losses, expected.repeat(2)) < 1e-6
    assert gap(expected, plain(ids, labels=ids).loss) > 1e-3


@torch.no_grad()
def test_the_trainer_smooths_labels_of_the_next_token(tmp_path: Path) -> None:
    plain, ids = tiny_plain(), tokens()
    args = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    models = (plain, from_base(plain, cycles=2))
    ours, theirs = (Trainer(m, args).compute_loss(m, {"input_ids": ids, "labels": ids.clone()}) for m in models)
    log_p = plain(ids).logits.log_softmax(-1)
    right = -0.9 * log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean() - 0.1 * log_p[:, :-1].mean()
    assert gap(ours, right) < 1e-5
    assert gap(ours, theirs) < 1e-5


@torch.no_grad()
def test_a_custom_loss_gets_its_own_arguments() -> None:
    model, ids = tiny(), tokens()
    model.loss_function = lambda logits, labels, vocab_size, scale=1.0, **_: scale * logits.mean()
    assert gap(model(ids, labels=ids, scale=3.0).loss, 3 * model(ids, labels=ids).loss) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_attention_weights(family: str) -> None:
    model, ids = tiny(family), tokens()
    with pytest.raises(ZerodraftError, match="output_attentions=True needs attn_implementation='eager', not 'sdpa'"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, output_zero_mass=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 9, 9)] * model.config.num_hidden_layers
    inner = torch.stack(out.attentions[1:-1]).sum(-1).unflatten(0, (model.config.cycles, -1))  # (c, layers, b, h, t)
    torch.testing.assert_close(inner + out.zero_mass.permute(2, 3, 0, 4, 1), torch.ones_like(inner))
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))


@torch.no_grad()
def test_outputs_as_a_tuple_and_chosen_states() -> None:
    model, ids = tiny(), tokens()
    for part in (model, model.model):
        as_dict, as_tuple = part(ids, use_cache=False), part(ids, use_cache=False, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], as_dict[0])
    every = model(ids, output_hidden_states=True).hidden_states
    for chosen, kept in (([-1], [8]), ([0, -2, 3, 40], [0, 3, 7]), (-1, [8])):
        some = model(ids, output_hidden_states=chosen).hidden_states
        assert [index for index, state in enumerate(some) if state is not None] == kept
        assert all(torch.equal(some[index], every[index]) for index in kept)
    assert len(model(ids, cycles=1, output_hidden_states=True).hidden_states) == 5
    chosen = model(ids, exit_rule=FixedExit(cycles=1), output_hidden_states=[-1]).hidden_states
    assert [index for index, state in enumerate(chosen) if state is not None] == [4]
