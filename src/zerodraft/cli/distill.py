"""`zerodraft distill`: a target's own completions, to train a drafter with."""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from zerodraft.cli.command import Command, Result, metavar, settings_of
from zerodraft.cli.loading import Dtype
from zerodraft.cli.progress import LiveProgress
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.drafters.distill import DistillSettings, Done, distill
from zerodraft.training.prompts import Prompt, PromptEncoder, read_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill(Command):
    """Let a target complete prompts, greedily and sampled, as training data for a drafter.

    Prompts come from text files (one a line) and JSONL files (instruction with input or context, question, prompt,
    problem or text), or the target invents them. After an interruption the same command continues.
    """

    example: ClassVar[str] = "zerodraft distill --target smollm2 --prompts prompts.jsonl --out completions"

    target: str = metavar("DIR|NAME", also=("model",))
    """The model that writes: directory, hub id or short name."""
    dtype: Dtype = "auto"
    """Dtype of the computation; auto: float32 on CPUs, else as stored."""
    prompts: tuple[str, ...] = metavar("FILE...", default=())
    """Files with prompts."""
    out: str = metavar("DIR")
    """Directory for the completions."""
    limit: int = 0
    """Use this many prompts from the files, drawn at random; 0: all."""
    chat: bool = True
    """Put prompts into the target's chat template."""
    settings: DistillSettings = settings_of(DistillSettings)

    def check(self) -> None:
        """Prompts: that there are some."""
        if self.limit < 0:
            raise ZerodraftError(f"--limit is {self.limit}; it must be 0 (all) or more")
        if not self.prompts and not self.settings.invent:
            raise ZerodraftError("no prompts: name files with --prompts, or let the target invent some with --invent")
        self._read()

    def run(self, console: Console) -> Result:
        """Loads the target, writes and reports."""
        from transformers import AutoModelForCausalLM

        from zerodraft.cli.loading import load_model
        from zerodraft.common.provenance import provenance
        from zerodraft.models.resolve import resolve
        from zerodraft.models.tokenizers import load_tokenizer
        from zerodraft.training.drafters.writer import HfWriter

        path, prompts = resolve(self.target), self._read()
        model = load_model(AutoModelForCausalLM, path, self.dtype)
        tokenizer = load_tokenizer(path)
        source = {"target_name": self.target, "prompt_files": sorted({prompt.source for prompt in prompts})}
        started = time.perf_counter()
        written = 0

        def show(done: Done) -> None:
            nonlocal written
            written = done.tokens
            text = f"{done.tokens:,} tokens, {done.tokens / done.seconds:.0f} tokens/s, batches"
            progress.show(text, done.batches, done.total)

        with LiveProgress(console) as progress:
            manifest = distill(
                HfWriter(model, tokenizer),
                PromptEncoder(tokenizer, chat=self.chat),
                prompts,
                self.out,
                self.settings,
                target=identity(path) | ({} if self.dtype == "auto" else {"dtype": self.dtype}),
                provenance=source | provenance(),
                on_batch=show,
            )
        seconds = time.perf_counter() - started
        speed = written / seconds if written else 0.0
        found = manifest["made_with"]["prompts"]
        if left_out := found["count"] - found["used"]:
            console.print(
                f"{left_out} of {found['count']} prompts were left out as too long: --max-prompt-tokens is "
                f"{self.settings.max_prompt_tokens}, and the target's context has to hold --max-new-tokens too"
            )
        console.print(
            f"{manifest['sequences']} completions, {manifest['completion_tokens']:,} tokens in {self.out}; "
            f"this run wrote {written:,} in {seconds:.0f} s ({speed:.0f} tokens/s)"
        )
        return {
            "out": self.out,
            "left_out": left_out,
            "sequences": manifest["sequences"],
            "tokens": manifest["tokens"],
            "completion_tokens": manifest["completion_tokens"],
            "written": written,
            "seconds": seconds,
            "tokens_per_second": speed,
        }

    def _read(self) -> list[Prompt]:
        prompts = read_prompts(self.prompts)
        if 0 < self.limit < len(prompts):
            prompts = random.Random(self.settings.seed).sample(prompts, self.limit)
        return prompts


def identity(path: Path) -> dict[str, Any]:
    """What tells one target from another without reading all its weights: its configuration and its weight files."""
    from zerodraft.models.cache import sha256_of

    weights = {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}
    return {"config_sha256": sha256_of(path / "config.json"), "weights": weights}
