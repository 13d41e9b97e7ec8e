"""What the machine is, and whether the library's own tests and commands run on it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from report import Report

from zerodraft.bench.measure import provenance

ROOT = Path(__file__).resolve().parents[2]


def facts(report: Report) -> None:
    """The card, and what else figures depend on."""

    def card() -> dict[str, Any]:
        if report.small:
            return {"name": "none, a rehearsal"}
        assert report.device.type == "cuda", "torch sees no CUDA device"
        of = torch.cuda.get_device_properties(0)
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        return {
            "name": of.name,
            "capability": f"{of.major}.{of.minor}",
            "memory_gib": of.total_memory / 2**30,
            "multiprocessors": of.multi_processor_count,
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "nvidia_smi": told.stdout.strip(),
        }

    report.step("card", card)
    report.step("provenance", lambda: provenance(seed=0, words=["python", "benchmarks/gpu/truth.py"]))


RECIPE = """
model: {family: llama, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 3, num_attention_heads: 2,
  num_key_value_heads: 1, head_dim: 32, max_position_embeddings: 64, cycles: 2}
tokenizer: {vocab_size: 400}
data: {train: [ROOT/docs/benchmarks.md], context_length: 32, cache: OUT/cache, validation_fraction: 0.1,
  document_chars: 500, validation_blocks: 8}
training: {steps: 12, batch_size: 4, warmup_steps: 2, save_every: 6, bf16: true, tensorboard: false}
"""


def commands(report: Report) -> None:
    """The command line as a user has it: a text with exits, and a training run."""
    if report.small:
        return
    folder = report.path.parent

    def run(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "zerodraft", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
            timeout=max(report.left, 1.0),
        )
        assert done.returncode == 0, done.stderr[-900:]
        return [line[:300] for line in (done.stdout + done.stderr).rstrip().split("\n")[-12:]]

    def train() -> list[str]:
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.replace("ROOT", str(ROOT)).replace("OUT", str(folder)), "utf-8")
        return run("pretrain", str(recipe), "--output", str(folder / "run"))

    model = str(ROOT / "models" / "ztt-million-exits")
    report.step("generate", lambda: run("generate", "--model", model, "Once upon a time", "--exit-rule", "calibrated"))
    report.step("train", train)


def tests(report: Report) -> None:
    """The tests that need CUDA, and those that say what it can do, with pytest."""
    files = [
        "tests/fast/test_cuda_graphs.py",
        "tests/drafters/test_recorded_block.py::test_cuda_graphs_draft_what_the_usual_path_drafts",
        "tests/ztt/test_attention.py::test_capability_on_cuda",
    ]
    # to have annotations checked takes longer than all of these tests
    files += ["--noconftest"] * report.small

    def run() -> str:
        words = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout=60", *files]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(report.left, 1.0),
        )
        end = "\n".join(done.stdout.rstrip().split("\n")[-25:])
        assert done.returncode == 0, f"{end}\n{done.stderr[-2000:]}"
        return end

    report.step("pytest", run)
