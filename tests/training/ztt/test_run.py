"""Runs from recipe to model: results, exact resume after a kill, refusals."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.callbacks import read_log
from zerodraft.training.folder import last_checkpoint
from zerodraft.training.recipe import Recipe, read_recipe
from zerodraft.training.ztt.models import build_from_start
from zerodraft.training.ztt.run import finetune, pretrain
from zerodraft.ztt.model import ZttForCausalLM

# a callback that sleeps, so that the kill hits the middle of the run
SLOW_RUN = """
import sys, time
from transformers import TrainerCallback
from zerodraft.training.recipe import load_recipe
from zerodraft.training.ztt.run import pretrain

class Slow(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.15)

pretrain(load_recipe(sys.argv[1], sys.argv[2:]), callbacks=[Slow()])
"""


def losses(folder):
    return {row["step"]: row["loss"] for row in read_log(Path(folder) / "log.jsonl") if "loss" in row}


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(Path(folder) / "model").state_dict()


def test_pretrain(make_recipe):
    recipe = make_recipe("training.steps=30", "training.eval_every=10", "training.accumulation=2")
    results = pretrain(recipe, callbacks=[])
    folder = Path(recipe.output)
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert list(losses(folder)) == list(range(1, 31))
    assert losses(folder)[30] < losses(folder)[1] - 0.5
    evaluations = [row for row in read_log(folder / "log.jsonl") if "eval_validation_loss_2" in row]
    assert [row["step"] for row in evaluations] == [10, 20, 30]
    assert results["evaluation"]["eval_validation_loss_1"] < evaluations[0]["eval_validation_loss_1"]
    assert not list(folder.glob("**/.*"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.use_cache
    tokenizer = load_tokenizer(folder / "model")
    out = model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 2


@pytest.mark.parametrize("overrides", [["model.kind=plain"], ["model.cycles=1", "model.zero_tokens=false"]])
def test_baselines_train_through_the_same_code(make_recipe, overrides):
    recipe = make_recipe("training.optimizer=muon", *overrides)
    results = pretrain(recipe, callbacks=[])
    assert set(results["evaluation"]) == {
        "eval_validation_loss_1",
        "eval_validation_perplexity_1",
        "eval_validation_bits_per_byte",
    }


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_cheaper_arithmetic_learns_the_same(make_recipe, tmp_path, option):
    common = ("loss.kind=weighted", "loss.token_depths=0")
    pretrain(make_recipe(*common, f"output={tmp_path / 'a'}"), callbacks=[])
    pretrain(make_recipe(*common, f"training.{option}=true", f"output={tmp_path / 'b'}"), callbacks=[])
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=2e-2 if option == "bf16" else 1e-6)


def test_plain_and_vanilla_are_the_same_model(make_recipe, tmp_path):
    for name, kind in (("a", "plain"), ("b", "ztt")):
        pretrain(
            make_recipe(f"model.kind={kind}", "model.cycles=1", "model.zero_tokens=false", f"output={tmp_path / name}"),
            callbacks=[],
        )
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_accumulation_equals_a_larger_batch(make_recipe, tmp_path):
    common = ("loss.kind=weighted", "loss.token_depths=0", "training.steps=3")
    pretrain(make_recipe(*common, "training.batch_size=4", f"output={tmp_path / 'a'}"), callbacks=[])
    pretrain(make_recipe(*common, "training.accumulation=2", f"output={tmp_path / 'b'}"), callbacks=[])
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)


def test_resume_after_kill_gives_the_same_losses(make_recipe, tmp_path):
    options = ("training.steps=16", "training.save_every=3", "training.optimizer=muon")
    whole = make_recipe(*options, f"output={tmp_path / 'whole'}")
    pretrain(whole, callbacks=[])
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path / "recipe.yaml"), *options, f"output={killed}"]
    errors = (tmp_path / "errors").open("w")
    process = subprocess.Popen(command, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while last_checkpoint(killed) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        errors.close()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "errors").read_text()[-2000:]
    # what a kill in the middle of saving leaves behind must not matter either
    (killed / ".partial" / "checkpoint-15").mkdir(parents=True)
    (killed / ".partial" / "checkpoint-15" / "trainer_state.json").write_text("{", encoding="utf-8")
    results = pretrain(make_recipe(*options, f"output={killed}"), resume=True, callbacks=[])
    assert results["resumed_from"] is not None
    assert losses(killed) == losses(whole.output)
    expected, got = weights(whole.output), weights(killed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


SCHEDULED = (
    "model.cycles=3",
    "model.ztt.input_injection=true",
    "loss.kind=weighted",
    "loss.token_depths=0",
    "loss.cycles_from=[0.4, 0.6]",
    "loss.exits_from=0.8",
    "training.steps=10",
    "training.optimizer=muon",
    "training.shared_learning_rate_factor=0.5",
)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_schedules_over_cycles_go_on_where_a_run_was_cut(make_recipe, tmp_path, step):
    """Before and after a cycle opens, and after the exits have begun."""
    options = (*SCHEDULED, "training.save_every=3", "training.keep_checkpoints=9")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(make_recipe(*options, f"output={whole}"), callbacks=[])
    rows = [row for row in read_log(whole / "log.jsonl") if "loss" in row]
    assert [row.get("cycles") for row in rows] == [1] * 4 + [2] * 2 + [None] * 4
    shutil.copytree(whole, cut)
    (cut / "results.json").unlink()
    for folder in cut.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    results = pretrain(make_recipe(*options, f"output={cut}"), resume=True, callbacks=[])
    assert results["resumed_from"] == f"checkpoint-{step}"
    assert [row for row in read_log(cut / "log.jsonl") if "loss" in row] == rows
    expected, got = weights(whole), weights(cut)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_late_exits_change_nothing_before_they_begin(make_recipe, tmp_path):
    late, never = tmp_path / "late", tmp_path / "never"
    pretrain(make_recipe(*SCHEDULED, f"output={late}"), callbacks=[])
    pretrain(make_recipe(*SCHEDULED, "loss.kind=last", "loss.exits_from=0", f"output={never}"), callbacks=[])
    first, second = losses(late), losses(never)
    assert [step for step in first if first[step] == second[step]] == list(range(1, 9))


class Clock(TrainerCallback):
    """A clock that only steps move, each by the same time."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        return self.now

    def on_step_begin(self, *args, **kwargs):
        self.now += self.seconds


def test_cycles_open_by_the_clock_where_it_ends_the_run(make_recipe, monkeypatch):
    recipe = make_recipe(
        "training.steps=100000",
        "training.max_minutes=1",
        "loss.kind=last",
        "loss.token_depths=0",
        "loss.cycles_from=[0.5]",
    )
    clock = Clock(60 / 8)
    # not the clock of all: a server that runs beside the tests would wait by it
    monkeypatch.setattr("zerodraft.training.base.time", clock)
    pretrain(recipe, callbacks=[clock])
    ran = [row.get("cycles") for row in read_log(Path(recipe.output) / "log.jsonl") if "loss" in row]
    assert ran == [1] * 4 + [None] * 4


def test_time_limit_moves_the_decay_forward(make_recipe):
    recipe = make_recipe("training.steps=100000", "training.max_minutes=0.05", "training.schedule=cosine")
    results = pretrain(recipe, callbacks=[])
    assert 2 < results["seconds"] < 60
    assert results["steps"] < 100000
    rates = [row["learning_rate"] for row in read_log(Path(recipe.output) / "log.jsonl") if "loss" in row]
    assert len(rates) == results["steps"]
    assert rates[-1] < 0.1 * max(rates)


def test_checkpoint_that_fails_midway_is_not_there(make_recipe, monkeypatch):
    recipe = make_recipe("training.save_every=2", "training.steps=6")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.Trainer._save_rng_state", fail)
    with pytest.raises(ZerodraftError, match="could not be written: disk full"):
        pretrain(recipe, callbacks=[])
    assert last_checkpoint(recipe.output) is None


def test_folder_checks(make_recipe):
    recipe = make_recipe("training.save_every=2", "training.steps=2")
    with pytest.raises(ZerodraftError, match="nothing to resume"):
        pretrain(recipe, resume=True)
    pretrain(recipe, callbacks=[])
    with pytest.raises(ZerodraftError, match="already holds a run"):
        pretrain(recipe)
    other = make_recipe("training.save_every=2", "training.steps=4", "model.cycles=3", "training.learning_rate=0.1")
    with pytest.raises(ZerodraftError, match=r"another model\.cycles, training\.learning_rate"):
        pretrain(other, resume=True)
    results = pretrain(make_recipe("training.save_every=2", "training.steps=4"), resume=True, callbacks=[])
    assert results["resumed_from"] == "checkpoint-2"
    assert list(losses(recipe.output)) == [1, 2, 3, 4]


def test_loss_that_is_not_finite_stops_the_run(make_recipe):
    recipe = make_recipe("training.learning_rate=1e20", "training.max_grad_norm=0", "training.steps=50")
    with pytest.raises(ZerodraftError, match=r"the loss became (nan|inf) at step \d+: lower training\.learning_rate"):
        pretrain(recipe, callbacks=[])
    assert not (Path(recipe.output) / "model").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.family=lama"], "did you mean 'llama'"),
        (["model.base.rope_tetha=1.0"], r"unknown key 'model\.base\.rope_tetha'"),
        (["model.ztt.zero_rop=none"], r"'model\.ztt\.zero_rop' \(did you mean 'zero_rope'\?\)"),
        (["model.cycles=0"], "cycles"),
        (["data.train=[nowhere.txt]"], r"no data at 'nowhere\.txt'"),
        (["model.start=somewhere"], "use finetune"),
        (["tokenizer.path=somewhere"], "'somewhere' is not a model directory, a hub id"),
        (["tokenizer.path=/somewhere"], "There is no such directory or file as '/somewhere'"),
        (["training.fsdp=true"], "needs several processes"),
        (["loss.weights=[1.0]"], "the model has 2 cycles"),
        (["loss.cycles_from=[0.1, 0.2]"], r"loss\.cycles_from has 2 numbers, the model has 2 cycles"),
        (["loss.kind=last", "loss.token_depths=0", "loss.exits_from=0.5"], r"loss\.exits_from needs loss\.kind"),
    ],
)
def test_refusals(make_recipe, monkeypatch, overrides, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = make_recipe(*overrides)
    with pytest.raises(ZerodraftError, match=message):
        pretrain(recipe, callbacks=[])
    assert not Path(recipe.output).exists()


def test_finetune_goes_on_where_pretrain_ended(make_recipe, tmp_path):
    first = make_recipe("training.steps=20")
    before = pretrain(first, callbacks=[])["evaluation"]
    second = make_recipe(f"model.start={first.output}/model", f"output={tmp_path / 'tuned'}", "training.steps=20")
    after = finetune(second, callbacks=[])["evaluation"]
    assert after["eval_validation_loss_2"] < before["eval_validation_loss_2"]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("ztt", ["model.cycles=5"], "model.cycles is 5, and the model to start from, .* has 2,"),
        ("ztt", ["model.ztt={residual_streams: 2}"], "model.ztt.residual_streams is 2, .* has 1,"),
        ("ztt", ["model.ztt={residual_streamz: 2}"], "did you mean 'residual_streams'"),
        ("ztt", ["model.num_hidden_layers=9"], "model.num_hidden_layers is 9, .* has 3,"),
        ("plain", ["model.hidden_size=512"], "model.hidden_size is 512, .* has 64,"),
    ],
)
def test_a_start_keeps_its_sizes_and_cycles(tmp_path, kind, settings, message):
    base = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    plain = LlamaForCausalLM(base)
    (plain if kind == "plain" else ZttForCausalLM.from_base(plain, cycles=2)).save_pretrained(tmp_path)
    recipe = read_recipe(Recipe, None, [f"model.start={tmp_path}", "output=x", *settings])
    with pytest.raises(ZerodraftError, match=message):
        build_from_start(recipe.model)
    assert build_from_start(read_recipe(Recipe, None, [f"model.start={tmp_path}", "output=x"]).model)


def test_finetune_needs_a_start(make_recipe):
    with pytest.raises(ZerodraftError, match=r"needs model\.start"):
        finetune(make_recipe())


def test_reporters(make_recipe, tmp_path):
    """Names go to transformers; a name or a package that is not there is told before anything is written."""
    with pytest.raises(ZerodraftError, match=r"'wand' is unknown \(did you mean 'wandb'\?\)"):
        pretrain(make_recipe("training.report_to=[wand]"), callbacks=[])
    missing = [name for name in ("wandb", "comet_ml") if importlib.util.find_spec(name) is None]
    for name in missing:
        with pytest.raises(ZerodraftError, match=f"training.report_to '{name}' cannot be used: .* installed"):
            pretrain(make_recipe(f"training.report_to=[{name}]"), callbacks=[])
    recipe = make_recipe("training.report_to=[tensorboard]", "training.steps=2")
    assert not Path(recipe.output).exists()
    pytest.importorskip("tensorboard")
    pretrain(recipe, callbacks=[])
    assert list(Path(recipe.output).glob("**/events.out.tfevents.*"))


def test_less_text_than_a_batch(make_recipe):
    with pytest.raises(ZerodraftError, match="blocks of 32 tokens, a batch takes 4000"):
        pretrain(make_recipe("training.batch_size=4000"), callbacks=[])
