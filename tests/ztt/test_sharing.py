"""A shared layer exists once: in memory after everything that happens to models, and in the checkpoint."""

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from tests.ztt.tiny import FAMILIES, LAYERS, base_config, gap, tiny, tokens
from zerodraft import ZttForCausalLM, ZttModel
from zerodraft.ztt.convert import from_base

CYCLES = 3


def executed_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in the order in which a forward pass runs them."""
    ran: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda module, *_: ran.append(module)) for layer in model.layers]
    with torch.no_grad():
        model(tokens(1, 4))
    for hook in hooks:
        hook.remove()
    return ran


def check_shared(model: Any) -> None:
    """Every cycle runs the same modules, and those hold each of their weights in one storage of their own."""
    ran = executed_layers(model)
    inner = LAYERS - 2
    cycles = [ran[1 + cycle * inner : 1 + (cycle + 1) * inner] for cycle in range(CYCLES)]
    assert len(ran) == model.config.num_hidden_layers == 2 + CYCLES * inner
    for cycle in cycles[1:]:
        assert all(ours is first for ours, first in zip(cycle, cycles[0], strict=True))
    assert len({id(layer) for layer in ran}) == LAYERS
    parameters = list(model.parameters())
    storages = {weight.untyped_storage().data_ptr() for weight in parameters if weight.numel()}
    assert len(storages) == len(parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_construction(family: str) -> None:
    check_shared(tiny(family, cycles=CYCLES))


def test_after_change_of_type_and_copy() -> None:
    model = tiny(cycles=CYCLES, cycle_gates=True, cycle_lora_rank=2)
    check_shared(model.to(torch.float64))
    check_shared(model.float())
    twin = copy.deepcopy(model)
    check_shared(twin)
    assert gap(twin(tokens()).logits, model(tokens()).logits) == 0
    before = model(tokens()).logits
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert gap(model(tokens()).logits, before) == 0


def test_training_one_cycle_trains_them_all() -> None:
    model = tiny(cycles=CYCLES).train()
    inputs = tokens()
    model(inputs, labels=inputs).loss.backward()
    weight: Any = model.layers[1].get_parameter("mlp.up_proj.weight")
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    check_shared(model.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_after_saving_and_loading(family: str, tmp_path: Path) -> None:
    model = tiny(family, cycles=CYCLES, cycle_gates=True, cycle_lora_rank=2)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ZttForCausalLM)
    check_shared(again)
    assert again.num_parameters() == model.num_parameters()
    assert gap(again(tokens()).logits, model(tokens()).logits) == 0


def test_checkpoint_stores_a_shared_weight_once(tmp_path: Path) -> None:
    model = tiny(cycles=CYCLES, cycle_gates=True)
    model.save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1
    with safe_open(files[0], "pt") as checkpoint:
        stored = {name: checkpoint.get_slice(name).get_shape() for name in checkpoint.keys()}  # noqa: SIM118  # no dict
    named = {name.replace("cycle_gates.weight", "cycle_gates") for name, _ in model.named_parameters()}
    assert set(stored) == named
    assert {name.split(".")[3] for name in stored if ".layers." in name} == {str(layer) for layer in range(LAYERS)}
    weights = 4 * model.num_parameters()
    assert weights <= files[0].stat().st_size < weights + 8192


def test_more_cycles_cost_no_weights() -> None:
    few, many = (tiny(cycles=cycles, zero_tokens=False).num_parameters() for cycles in (1, 9))
    assert few == many


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny(base=base_config("llama", tie_word_embeddings=True), cycles=CYCLES)
    untied = tiny(cycles=CYCLES)
    assert model.num_parameters() == untied.num_parameters() - 64 * 32
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_config(base_config("llama", tie_word_embeddings=True))
    for tied in (model, again, copy.deepcopy(model), from_base(base, cycles=CYCLES)):
        assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
        check_shared(tied)
    assert gap(again(tokens()).logits, model(tokens()).logits) == 0


def test_model_without_head_loads_the_same_checkpoint(tmp_path: Path) -> None:
    model = tiny(cycles=CYCLES)
    model.save_pretrained(tmp_path)
    body: Any = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, ZttModel)
    check_shared(body)
    states = body(tokens()).last_hidden_state
    head: Any = model.get_output_embeddings()
    assert gap(head(states), model(tokens()).logits) < 1e-6


def test_sharded_checkpoint_as_push_to_hub_makes_it(tmp_path: Path) -> None:
    """push_to_hub saves with save_pretrained and uploads; large models go into several files."""
    model = tiny(cycles=CYCLES, cycle_lora_rank=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    code = [file.read_text(encoding="utf-8").split("#")[0].strip() for file in tmp_path.glob("*.py")]
    assert code == ["from zerodraft import ZttConfig, ZttForCausalLM, ZttModel"], "one import, no copies of the package"
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_shared(again)
    assert gap(again(tokens()).logits, model(tokens()).logits) == 0


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    distributed = torch.distributed
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_after_fsdp_wrap(one_process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = tiny(cycles=CYCLES, cycle_gates=True, cycle_lora_rank=2).train()
    plain, inputs = copy.deepcopy(model), tokens()
    expected = plain(inputs, labels=inputs)
    expected.loss.backward()

    mesh = init_device_mesh("cpu", (1,))
    layers = model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(ours is before for ours, before in zip(model.layers, layers, strict=True))
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about gloo and a single process
        loss = model(inputs, labels=inputs).loss
        loss.backward()
    assert gap(loss, expected.loss) < 1e-6
    gradients = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        ours, theirs = weight.grad, gradients[name].grad
        assert isinstance(ours, DTensor)
        assert theirs is not None
        assert gap(ours.full_tensor(), theirs) < 1e-5, name
