"""The job that makes a drafter on a GPU: rehearsed at tiny size, and what writes in large batches."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from gpu.batch_writer import StaticWriter, choose, pack
from tests.fast.tape import Taped
from tests.saved import save_target
from zerodraft.drafters.block_model import BlockDrafterModel
from zerodraft.fast.recorded import RecordingError
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.drafters.completions import Completion, read_completions, write_shard
from zerodraft.training.drafters.distill import DistillSettings
from zerodraft.training.drafters.writer import HfWriter

ROOT = Path(__file__).resolve().parents[2]


def test_a_rehearsal_brings_a_drafter_and_completions(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "drafter.py"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=560)
    steps = json.loads((tmp_path / "drafter.json").read_text("utf-8"))
    assert {name: step for name, step in steps.items() if step["outcome"] != "passed"} == {}, done.stderr[-2000:]
    assert done.returncode == 0
    found = {name: step["found"] for name, step in steps.items()}
    assert list(found) == ["target", "completions", "training", "tokens a pass"]
    written = read_completions(tmp_path / "completions")
    assert written.shards == ("part-0",)
    new = int((written.lengths - written.prompt_lengths).sum())
    assert found["completions"]["tokens"] == new >= 2500
    assert found["completions"]["recorded"] is True
    assert 0 < found["completions"]["greedy"] < len(written)
    assert 0 < found["completions"]["invented"] < len(written)
    assert {loss: of["steps"] for loss, of in found["training"].items()} == {"both": 6, "variation": 6}
    assert all(of["mat"] >= 1 for of in found["tokens a pass"].values())
    best = max(found["tokens a pass"], key=lambda loss: found["tokens a pass"][loss]["mat"])
    assert json.loads((tmp_path / "drafter" / "recipe.json").read_text("utf-8"))["loss"]["label"] == best
    drafter = BlockDrafterModel.from_pretrained(tmp_path / "drafter")
    assert drafter.dtype == torch.bfloat16


class Refusing(Taped):
    """Cannot record."""

    def __call__(self, run: object) -> object:
        raise RecordingError("no")


@pytest.mark.parametrize("recorder", [Taped, Refusing])
def test_large_batches_are_what_generate_writes(tmp_path: Path, recorder: type[Taped]) -> None:
    path = save_target(tmp_path)
    model = LlamaForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = list(range(1, 300, 20))
    tokenizer = load_tokenizer(str(path))
    prompts = [[5, 9, 12], [7], list(range(20, 90)), [250, 3]]
    settings, sizes = DistillSettings(top_k=1), {"limit": 18, "seed": 3}
    expected = HfWriter(model, tokenizer).write(prompts, settings, temperature=0, **sizes)
    assert len({len(row) for row in expected}) > 1
    writer = StaticWriter(model, tokenizer, recorder)
    for temperature in (0, 0.7):  # the likeliest of one candidate
        assert writer.write(prompts, settings, temperature=temperature, **sizes) == expected
    assert writer.recorded is (recorder is Taped)
    free = partial(writer.write, prompts, DistillSettings(), temperature=1.0, limit=18)
    assert free(seed=1) == free(seed=1) != free(seed=2)


def test_samples_have_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.2])
    p = (logits / 0.7).softmax(-1)
    # the first three reach 0.9, and top k leaves four
    allowed = torch.tensor([1, 3, 0])
    assert p[allowed[:2]].sum() < 0.9 < p[allowed].sum()
    settings = DistillSettings(top_k=4, top_p=0.9)
    drawn = choose(logits.expand(20_000, -1), 0.7, settings).bincount(minlength=5)
    assert drawn[[2, 4]].sum() == 0
    expected = 20_000 * p[allowed] / p[allowed].sum()
    # chi-square with two degrees of freedom: beyond 13.8 once in a thousand seeds
    assert ((drawn[allowed] - expected) ** 2 / expected).sum() < 13.8


def test_files_are_packed_and_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.batch_writer.LARGEST", 100)
    rows = [Completion([number] * (5 + number % 7), 2, 0.5 * (number % 2), f"s{number}") for number in range(30)]
    for name in ("a", "b"):
        write_shard(tmp_path / "in", name, rows[:13] if name == "a" else rows[13:], 300)
    pack(read_completions(tmp_path / "in"), tmp_path / "out", 300)
    packed = read_completions(tmp_path / "out")
    assert len(packed.shards) > 3
    assert [packed[i][0].tolist() for i in range(30)] == [row.tokens for row in rows]
    assert packed.sources == tuple(row.source for row in rows)
    assert max(file.stat().st_size for file in (tmp_path / "out").glob("*.bin")) <= 100 + 2 * 11
