"""Runs that are trained as one come out as those that are trained one by one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import stack_module_state
from transformers import AutoModelForCausalLM

from tests.fast.tape import Taped
from tests.ztt.tiny import tiny
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.base import LossNotFinite
from zerodraft.training.callbacks import read_log
from zerodraft.training.stacked_optim import StackedOptimizer
from zerodraft.training.ztt.run import pretrain
from zerodraft.training.ztt.stacked import STATE, StackedPaused, pretrain_stacked

COMPILED = """
import functools, json, sys
import torch
from zerodraft.training.recipe import load_recipe
from zerodraft.training.ztt.stacked import pretrain_stacked

# what is traced is the same; to compile it for a CPU takes minutes
torch.compile = functools.partial(torch.compile, backend="aot_eager")
pretrain_stacked([load_recipe(sys.argv[1], words) for words in json.loads(sys.argv[2])])
"""

COMMON = ("loss.kind=last", "loss.token_depths=0", "model.family=qwen3", "training.steps=12")
RUNS = (("seed=3", "training.learning_rate=0.01"), ("seed=4", "training.learning_rate=0.003"))


def losses(folder):
    return [row["loss"] for row in read_log(Path(folder) / "log.jsonl") if "loss" in row]


def recipes(make_recipe, place, *overrides, runs=RUNS):
    return [make_recipe(*COMMON, *overrides, *run, f"output={place / str(i)}") for i, run in enumerate(runs)]


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.optimizer=muon", "training.muon_learning_rate=0.02", "model.ztt={input_injection: true}"),
        (
            "training.shared_learning_rate_factor=0.5",
            "model.cycles=3",
            "loss.cycles_from=[0.3, 0.6]",
            "model.ztt={input_injection: true, residual_streams: 2}",
        ),
        ("loss.kind=weighted", "loss.exits_from=0.5", "training.optimizer=muon", "training.max_grad_norm=0.1"),
        ("model.cycles=1", "model.zero_tokens=false", "training.max_grad_norm=0"),
        ("training.bf16=true",),
    ],
    ids=["muon", "opening cycles", "late exits", "vanilla", "bfloat16"],
)
def test_as_one_by_one(make_recipe, tmp_path, overrides):
    together = pretrain_stacked(recipes(make_recipe, tmp_path / "together", *overrides))
    exact = 2e-2 if "training.bf16=true" in overrides else 1e-4
    for index, recipe in enumerate(recipes(make_recipe, tmp_path / "alone", *overrides)):
        alone, folder = pretrain(recipe, callbacks=[]), tmp_path / "together" / str(index)
        assert losses(folder) == pytest.approx(losses(recipe.output), rel=exact)
        found = together[index]
        assert not isinstance(found, LossNotFinite)
        assert found["evaluation"] == pytest.approx(alone["evaluation"], rel=exact)
        assert {key: found[key] for key in ("parameters", "steps", "tokens")} == {
            key: alone[key] for key in ("parameters", "steps", "tokens")
        }
        if exact > 1e-4:
            continue  # in so few steps AdamW makes much of small differences
        model, other = (AutoModelForCausalLM.from_pretrained(Path(f) / "model") for f in (folder, recipe.output))
        ids = torch.arange(20)[None]
        assert torch.allclose(model(ids).logits, other(ids).logits, atol=2e-3)
    assert losses(tmp_path / "together" / "0") != losses(tmp_path / "together" / "1")


def test_compiled(make_recipe, tmp_path):
    overrides = ("training.optimizer=muon", "training.steps=3")
    eager = recipes(make_recipe, tmp_path / "eager", *overrides)
    pretrain_stacked(eager)
    compiled = [
        ["training.compile=true", *COMMON, *overrides, *run, f"output={tmp_path / 'compiled' / str(i)}"]
        for i, run in enumerate(RUNS)
    ]
    # in a process of its own, where no type checks are woven into what torch compiles
    words = [sys.executable, "-c", COMPILED, str(tmp_path / "recipe.yaml"), json.dumps(compiled)]
    subprocess.run(words, check=True, timeout=600)
    for index, recipe in enumerate(eager):
        assert losses(tmp_path / "compiled" / str(index)) == pytest.approx(losses(recipe.output), rel=1e-4)


def test_an_update_can_be_part_of_a_graph(make_recipe, tmp_path):
    """On CUDA a compiled step is recorded; the tape refuses what a graph cannot hold and replays the rest."""
    found = []
    for record in (lambda run: run, Taped(torch.device("cpu"))):
        training = [recipe.training for recipe in recipes(make_recipe, tmp_path, "training.optimizer=muon")]
        models = [tiny(input_injection=True, seed=seed) for seed in range(2)]
        parameters = {name: value.detach() for name, value in stack_module_state(models)[0].items()}
        optimizer = StackedOptimizer(models, parameters, training)
        optimizer.begin_step(0.5)
        gradients = [None if "embed" in name else value.clone() for name, value in parameters.items()]
        before = [value.clone() for value in (*parameters.values(), *optimizer.state())]

        def update(optimizer=optimizer, gradients=gradients):
            optimizer.step(gradients)

        run = record(update)
        for value, kept in zip((*parameters.values(), *optimizer.state()), before, strict=True):
            value.copy_(kept)
        run()
        optimizer.begin_step(0.25)
        run()
        found.append([*parameters.values(), *optimizer.state()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other)


def test_stopped_runs_go_on(make_recipe, tmp_path):
    whole = pretrain_stacked(recipes(make_recipe, tmp_path / "whole", "training.optimizer=muon"))
    stopped = recipes(make_recipe, tmp_path / "stopped", "training.optimizer=muon", "training.save_every=5")
    with pytest.raises(StackedPaused):
        pretrain_stacked(stopped, deadline=0.0)
    assert len(losses(stopped[0].output)) == 1
    with pytest.raises(ZerodraftError, match="other runs"):
        pretrain_stacked(stopped[:1])
    resumed = pretrain_stacked(stopped)
    for one, other, recipe in zip(whole, resumed, stopped, strict=True):
        assert not isinstance(one, LossNotFinite)
        assert not isinstance(other, LossNotFinite)
        assert one["evaluation"] == other["evaluation"]
        assert len(losses(recipe.output)) == 12
    assert not (tmp_path / "stopped" / "0" / STATE).exists()


def test_one_that_diverges_does_not_harm_the_others(make_recipe, tmp_path):
    runs = (("seed=3", "training.learning_rate=1e30"), ("seed=4", "training.learning_rate=0.003"))
    lost, found = pretrain_stacked(recipes(make_recipe, tmp_path / "both", "training.max_grad_norm=0", runs=runs))
    assert isinstance(lost, LossNotFinite)
    assert "at step" in str(lost)
    alone = pretrain(recipes(make_recipe, tmp_path / "one", "training.max_grad_norm=0", runs=runs)[1], callbacks=[])
    assert not isinstance(found, LossNotFinite)
    assert found["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("training.batch_size=4",), "training.batch_size"),
        (("loss.kind=sampled",), "loss.kind"),
    ],
)
def test_runs_that_do_not_go_together_are_refused(make_recipe, tmp_path, changes, message):
    one, other = recipes(make_recipe, tmp_path / "runs")
    odd = make_recipe(*COMMON, *changes, "seed=5", f"output={tmp_path / 'odd'}")
    with pytest.raises(ZerodraftError, match=message):
        pretrain_stacked([one, odd, other])
    assert not (tmp_path / "odd").exists()


def test_completions_are_refused(make_recipe, tmp_path):
    rows = [{"prompt": "the quick", "completion": "brown fox jumps over a lazy dog"}] * 60
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ZerodraftError, match="messages or completions"):
        pretrain_stacked(recipes(make_recipe, tmp_path / "runs", f"data.train=[{tmp_path / 'rows.jsonl'}]"))


@pytest.mark.parametrize("change", ["loss.kind=sampled", "training.accumulation=2", "training.max_minutes=1"])
def test_what_cannot_be_trained_as_one_is_refused(make_recipe, tmp_path, change):
    with pytest.raises(ZerodraftError, match=change.split("=")[0]):
        pretrain_stacked(recipes(make_recipe, tmp_path / "runs", change))
