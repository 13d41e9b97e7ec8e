"""Schedules, parameter groups and Muon."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.ztt.tiny import tiny
from zerodraft.training.muon import orthogonalise
from zerodraft.training.optim import JoinedOptimizer, build_optimizer, learning_rate_scale
from zerodraft.training.recipe import TrainingRecipe


class Toy(nn.Module):
    """One of everything that a model has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.cycle_gates = nn.Parameter(torch.zeros(2, 3))
        self.input_injection, self.cycle_scales = nn.Linear(1, 2, bias=False), nn.Linear(1, 3, bias=False)
        self.zero_tokens = nn.Module()
        self.zero_tokens.keys = nn.Parameter(torch.ones(2, 3, 1, 4))
        self.lm_head = nn.Linear(6, 11, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        hidden = self.norm(self.embed(ids))
        hidden = hidden + self.down(self.up(hidden).relu()) * (1 + self.cycle_gates.sum())
        hidden = hidden * (self.input_injection.weight.sum() + self.cycle_scales.weight.sum())
        return self.lm_head(hidden) + self.zero_tokens.keys.sum()


def train(model, optimizer, steps):
    ids = torch.arange(8) % 11
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedule(schedule):
    recipe = TrainingRecipe(steps=100, warmup_steps=10, schedule=schedule, decay_fraction=0.3, final_scale=0.1)
    scale = [learning_rate_scale(recipe, step) for step in range(101)]
    assert scale[0] == pytest.approx(0.1)
    assert scale[9] == scale[10] == 1.0
    assert scale[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(later <= earlier for earlier, later in pairwise(scale[10:]))
    if schedule == "wsd":
        assert scale[70] == 1.0
        assert scale[85] == pytest.approx(0.55)


def test_only_matrices_decay():
    model = Toy()
    recipe = TrainingRecipe(weight_decay=0.3, learning_rate=0.1, ztt_learning_rate=0.2)
    decayed, own, rest = build_optimizer(model, recipe).param_groups
    assert [group["weight_decay"] for group in (decayed, own, rest)] == [0.3, 0.0, 0.0]
    assert [group["lr"] for group in (decayed, own, rest)] == [0.1, 0.2, 0.1]
    assert {id(p) for p in decayed["params"]} == {id(model.up.weight), id(model.down.weight)}
    numbers = (model.cycle_gates, model.input_injection.weight, model.cycle_scales.weight, model.zero_tokens.keys)
    assert {id(p) for p in own["params"]} == {id(p) for p in numbers}
    assert sum(len(group["params"]) for group in (decayed, own, rest)) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_of_cycled_layers_learn_at_their_own_rate(optimizer):
    model = tiny(cycles=2, input_injection=True, residual_streams=2)
    rates = {"learning_rate": 0.1, "muon_learning_rate": 0.4, "ztt_learning_rate": 0.2}
    recipe = TrainingRecipe(optimizer=optimizer, shared_learning_rate_factor=0.5, weight_decay=0.3, **rates)
    rate = 0.4 if optimizer == "muon" else 0.1
    groups = build_optimizer(model, recipe).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (rate, 0.3),
        (rate / 2, 0.3),
        (0.2, 0.0),
        (0.1, 0.0),
    ]
    matrices = [{id(p) for p in layer.parameters() if p.ndim == 2} for layer in model.layers]
    head, *shared, tail = matrices
    assert [{id(p) for p in group["params"]} for group in groups[:2]] == [head | tail, set().union(*shared)]
    once = build_optimizer(tiny(cycles=1), recipe).param_groups
    assert [group["lr"] for group in once] == [rate, 0.2, 0.1]


def test_frozen_parameters_are_left_out():
    model = Toy()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.norm.weight)
    (group,) = build_optimizer(model, TrainingRecipe(optimizer="muon")).param_groups
    assert group["params"] == [model.norm.weight]


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4)])
def test_orthogonalise(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert singular.min() > 0.4
    assert singular.max() < 1.4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_goes_on_from_a_state_dict(name):
    recipe = TrainingRecipe(optimizer=name, learning_rate=0.02)
    model = Toy()
    optimizer = build_optimizer(model, recipe)
    first = train(model, optimizer, 1)
    train(model, optimizer, 10)
    other = copy.deepcopy(model)
    restored = build_optimizer(other, recipe)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 10) == train(other, restored, 10) < first


def test_joined_optimizer_follows_a_scheduler():
    model = Toy()
    optimizer = build_optimizer(model, TrainingRecipe(optimizer="muon", learning_rate=0.5, muon_learning_rate=0.25))
    assert isinstance(optimizer, JoinedOptimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    train(model, optimizer, 1)
    scheduler.step()
    rates = [group["lr"] for member in optimizer.members for group in member.param_groups]
    assert rates == pytest.approx([0.025, 0.05, 0.05])
