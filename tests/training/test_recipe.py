"""Recipes: strict, with a suggestion for every slip."""

from pathlib import Path

import pytest

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.drafters.kinds import RECIPES
from zerodraft.training.recipe import Recipe, load_recipe, read_recipe
from zerodraft.training.strict import from_mapping, to_mapping

DRAFTERS = {f"smollm2-{'drafter' if kind == 'block' else kind}": recipe for kind, recipe in RECIPES.items()}
RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    recipe = read_recipe(DRAFTERS.get(path.stem, Recipe), path, {})
    assert recipe.training.steps


def test_round_trip(write):
    recipe = load_recipe(write("output: x\nloss: {kind: weighted, weights: [1, 2]}\ntraining: {learning_rate: 1e-3}\n"))
    assert recipe.loss.weights == (1.0, 2.0)
    assert recipe.training.learning_rate == 1e-3
    assert from_mapping(Recipe, to_mapping(recipe)) == recipe


def test_overrides(write):
    path = write("output: x\n")
    assert load_recipe(path, ["training.steps=7", "data.train=[a, b]"]).data.train == ("a", "b")
    assert load_recipe(path, {"training.steps": 7}).training.steps == 7
    with pytest.raises(ZerodraftError, match="key=value"):
        load_recipe(path, ["training.steps"])
    with pytest.raises(ZerodraftError, match="not a section"):
        load_recipe(path, ["output.steps=7"])


def test_extends(write):
    path = write("output: x\nmodel: {cycles: 3, head_layers: 2}\n")
    other = path.with_name("other.yaml")
    other.write_text("extends: recipe.yaml\noutput: y\nmodel: {cycles: 1}\n", encoding="utf-8")
    recipe = load_recipe(other)
    assert (recipe.output, recipe.model.cycles, recipe.model.head_layers) == ("y", 1, 2)
    with pytest.raises(ZerodraftError, match="extends itself"):
        load_recipe(write("extends: recipe.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: x\nmodel: {hiden_size: 3}", r"unknown key 'model.hiden_size' \(did you mean 'hidden_size'\?\)"),
        ("output: x\nmodel: {cycles: two}", r"'model.cycles' must be a whole number, got 'two'"),
        ("output: x\nmodel: {cycles: true}", r"'model.cycles' must be a whole number, got True"),
        ("output: x\nmodel: {zero_tokens: 1}", "true or false"),
        ("output: x\nmodel: 3", "'model' must be a mapping"),
        ("output: x\ndata: {train: file.txt}", r"'data.train' must be a list"),
        ("output: x\ndata: {evaluation: [1]}", r"'data.evaluation' must be a mapping"),
        ("output: x\nloss: {kind: lst}", r"did you mean 'last'"),
        ("output: x\nloss: {weights: unifrm}", r"'loss.weights' must be a list or one of 'uniform', 'linear'"),
        ("output: x\ntraining: {learning_rate: fast}", r"'training.learning_rate' must be a number, got 'fast'"),
        ("output: x\ntraining: {shared_learning_rate_factor: 0}", r"training.shared_learning_rate_factor is 0"),
        ("output: x\ntraining: {shared_learning_rate_factor: .nan}", r"shared_learning_rate_factor.* nan"),
        ("output: x\ntraining: {betas: [0.9]}", r"training.betas is \[0.9\]; it must be two numbers"),
        ("output: x\ntraining: {betas: [0.9, 1.0]}", r"training.betas is \[0.9, 1.0\]"),
        ("output: x\ntraining: {betas: [.nan, 0.9]}", r"training.betas is \[nan, 0.9\]"),
        ("output: x\ntraining: {ztt_learning_rate: -1}", r"training.ztt_learning_rate is -1"),
        ("output: x\ntraining: {muon_learning_rate: .nan}", r"training.muon_learning_rate is nan"),
        ("output: x\ntraining: {weight_decay: .inf}", r"training.weight_decay is inf"),
        ("output: x\ntraining: {final_scale: .nan}", r"training.final_scale is nan"),
        ("output: x\ntraining: {decay_fraction: 35}", r"training.decay_fraction is 35.*from 0 to 1"),
        ("output: x\npeft: {dropout: 1}", r"peft.dropout is 1"),
        ("output: x\npeft: {alpha: .nan}", r"peft.alpha is nan"),
        ("output: x\ndata: {context_length: 1}", r"data.context_length is 1; it must be at least 2"),
        ("output: x\nloss: {cycles_from: 0.4}", r"'loss.cycles_from' must be a list"),
        ("seed: 0", "missing key 'output'"),
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_one_clear_sentence(write, text, message):
    with pytest.raises(ZerodraftError, match=message) as caught:
        load_recipe(write(text))
    assert "\n" not in str(caught.value)


def test_missing_recipe_suggests_a_neighbour(write):
    path = write("output: x\n")
    with pytest.raises(ZerodraftError, match=r"did you mean 'recipe\.yaml'"):
        load_recipe(path.with_name("recipes.yaml"))
