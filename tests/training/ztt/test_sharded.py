"""Two gloo processes with FSDP2 train as one process does: losses, checkpoints and the saved model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training.resuming import losses
from zerodraft.training.ztt.run import pretrain

WORKER = Path(__file__).with_name("sharded_worker.py")
OPTIONS = (
    "training.steps=6",
    "loss.token_depths=0",
    "training.schedule=constant",
    "model.tie_word_embeddings=false",
    "model.ztt.input_injection=true",
    "model.ztt.cycle_scales=true",
    "model.ztt.residual_streams=2",
)
SHARDED = ("training.batch_size=2", "training.fsdp=true", "training.save_every=3")


def run_sharded(recipe, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), recipe, *OPTIONS, *SHARDED, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(make_recipe, tmp_path):
    pretrain(make_recipe(*OPTIONS, "training.batch_size=4", f"output={tmp_path / 'one'}"), callbacks=[])
    run_sharded(str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'two'}")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 6
    assert two == pytest.approx(one, rel=1e-5)
    expected, got = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    assert type(got).__name__ == "ZttForCausalLM"
    for (name, a), b in zip(expected.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4, msg=name)
