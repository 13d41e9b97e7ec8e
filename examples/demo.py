"""What `make demo` runs: both systems, one after the other.

DiffuSpec: SmolLM2 answers questions with drafts and plainly, the same tokens. Zero Token Transformers: a shipped one
writes, then a smaller one learns next to a vanilla one. Every figure that it prints is measured in this run. Usage:
`python examples/demo.py [--minutes 2] [--json]`.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zerodraft.cli.main import log_to_stderr, no_bars_in_a_pipe
from zerodraft.common.errors import ZerodraftError

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "ztt-tiny"
BOOKS = ROOT / "examples" / "data"
RECIPES = {"ztt": ROOT / "recipes" / "demo.yaml", "vanilla": ROOT / "recipes" / "demo-vanilla.yaml"}
TITLES = {"ztt": "Zero Token Transformer", "vanilla": "vanilla, equal parameters"}
TARGET = "smollm2"
QUESTIONS = (
    "What is a fox?",
    "Write a Python function that returns the sum of the even numbers in a list.",
    "A farmer has 12 hens. Each hen lays 5 eggs a week. How many eggs does the farmer get in 4 weeks?",
)
PROMPTS = (
    "It was a dark and stormy night, and the old man",
    "The cell membrane is",
    "In this chapter, you will learn about",
)
SEED = 0
SPEED_SECONDS = 12.0
"""On a slow or busy machine a batch size gets fewer turns than three once this time has passed."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 when done, 2 with one sentence when something that it needs is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a trained and calibrated Zero Token Transformer")
    parser.add_argument("--target", default=TARGET, help="the chat model that decodes with drafts")
    parser.add_argument("--drafter", default="", help="as for 'zerodraft generate'")
    parser.add_argument("--answer-tokens", type=int, default=96, help="length of each answer")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to train, both models together")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of each text")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    options = parser.parse_args(words)
    console = Console(stderr=options.json, highlight=False)
    log_to_stderr(logging.INFO)
    no_bars_in_a_pipe()
    started = time.perf_counter()
    try:
        if not (options.model / "config.json").is_file():
            raise ZerodraftError(f"no model at {options.model}: clone the repository with models/, or give --model DIR")
        drafts = decode(console, options.target, options.drafter, options.answer_tokens)
        result = {"drafts": drafts, **run(console, options.model, options.minutes * 60, options.new_tokens)}
    except ZerodraftError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    result["seconds"] = time.perf_counter() - started
    summary(console, result)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def decode(console: Console, target: str, drafter: str, new_tokens: int) -> dict[str, Any]:
    """Answers decoded with drafts and plainly: the same tokens, and how much faster."""
    console.rule("DiffuSpec: a model answers with drafts, then plainly")
    console.print(f"loading torch, transformers and {target} (downloaded and converted the first time) ...")
    import torch
    from transformers.utils import logging as transformers_logging

    from zerodraft import decoder
    from zerodraft.cli.decoding import Sampling, decode_and_report, load_target
    from zerodraft.generate.drafters import find_drafter
    from zerodraft.models.tokenizers import encode

    transformers_logging.disable_progress_bar()
    try:
        model, tokenizer = load_target(target)
    except ZerodraftError as error:
        console.print(f"[red]left out:[/red] {error}")
        return {"target": target, "left_out": str(error)}
    drafting, name = find_drafter(drafter, model, target)
    console.print(
        f"{target}: {model.num_parameters():,} parameters, drafts by {name}, {torch.get_num_threads()} threads\n"
    )
    spec = decoder(model, drafting, trace=True)
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0, top_p=1.0, seed=SEED)
    answers = []
    for question in QUESTIONS:
        console.print(Text(question, style="bold"))
        inputs = encode(tokenizer, question, chat=True)
        result = decode_and_report(model, tokenizer, spec, inputs, sampling, console, name=name, plainly_too=True)
        answers.append({"prompt": question, **result})
        console.print()
    tokens = sum(answer["new_tokens"] for answer in answers)
    drafted, plain, own = (
        tokens / sum(answer["new_tokens"] / answer[key] for answer in answers)
        for key in ("tokens_per_second", "plain_tokens_per_second", "own_plain_tokens_per_second")
    )
    return {
        "target": target,
        "drafter": name,
        "threads": torch.get_num_threads(),
        "answers": answers,
        "new_tokens": tokens,
        "equal": all(answer["equal"] for answer in answers),
        "tokens_per_second": drafted,
        "plain_tokens_per_second": plain,
        "own_plain_tokens_per_second": own,
        "speedup": drafted / plain,
        "speedup_over_own_plain": drafted / own,
        "mat": (tokens - len(answers)) / max(1, sum(answer["stats"]["steps"] for answer in answers)),
    }


def run(
    console: Console, path: Path, seconds: float, new_tokens: int, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All of Zero Token Transformers: text, speed, training; `overrides` are laid over the recipes."""
    import torch
    from transformers.utils import logging

    from zerodraft.cli.loading import load_ztt
    from zerodraft.models.tokenizers import load_tokenizer

    logging.disable_progress_bar()
    model, folder = load_ztt(str(path))
    tokenizer = load_tokenizer(folder)
    rule = model.calibrated_exit_rule()
    config = model.config
    console.print(
        f"{path.name}: {model.num_parameters():,} parameters in {config.stored_layers} layers, "
        f"{config.num_hidden_layers} layers deep with {config.cycles} cycles; exit rule {rule}; "
        f"{torch.get_num_threads()} threads"
    )
    return {
        "model": {"name": path.name, "parameters": model.num_parameters(), "cycles": config.cycles},
        "exit_rule": config.exit_rule,
        "threads": torch.get_num_threads(),
        "texts": write(console, model, tokenizer, rule, new_tokens),
        "speed": speed(console, model, tokenizer, rule, new_tokens),
        "text": on_text(console, model, tokenizer, rule),
        "training": train(console, seconds, overrides or {}),
    }


def write(console: Console, model: Any, tokenizer: Any, rule: Any, new_tokens: int) -> list[dict[str, Any]]:
    """Texts in which each token has the colour of its depth."""
    import torch

    from zerodraft.cli.depth import colour, legend
    from zerodraft.ztt.streamer import DepthStreamer

    console.rule("It writes; the colour of a token is the number of cycles that it took")
    texts = []
    for prompt in PROMPTS:
        torch.manual_seed(SEED)
        console.print(Text(prompt, style="bold"), end="")

        def show(text: str, depth: int) -> None:
            console.print(Text(text, style=colour(depth)), end="", soft_wrap=True)

        streamer = DepthStreamer(model, tokenizer, show)
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        model.generate(**inputs, max_new_tokens=new_tokens, exit_rule=rule, streamer=streamer, **sampling)
        console.print()
        if console.color_system is None:
            console.print(f"depth of each new token: {' '.join(map(str, streamer.depths))}", soft_wrap=True)
        console.print(legend(streamer.depths))
        console.print()
        text = tokenizer.decode(streamer.tokens, skip_special_tokens=True)
        texts.append({"prompt": prompt, "text": text, "depths": streamer.depths})
    return texts


def speed(
    console: Console, model: Any, tokenizer: Any, rule: Any, new_tokens: int, batches: Sequence[int] = (1, 16, 64)
) -> list[dict[str, Any]]:
    """Tokens per second with exits off and on: a warm-up, then turns, and the median."""
    console.rule("Tokens per second, exits off and on")
    results = []
    for batch in batches:
        prompts, length = book_blocks(tokenizer, batch, 32), new_tokens if batch == 1 else max(1, new_tokens // 2)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        cycles = 0.0
        started = time.perf_counter()
        for turn in range(4):
            if turn > 1 and time.perf_counter() - started > SPEED_SECONDS:
                break
            for exits in (False, True):
                before = time.perf_counter()
                model.generate(
                    prompts,
                    attention_mask=prompts.new_ones(prompts.shape),
                    min_new_tokens=length,
                    max_new_tokens=length,
                    do_sample=False,
                    exit_rule=rule if exits else None,
                )
                if turn > 0:
                    seconds[exits].append(time.perf_counter() - before)
                if exits:
                    # the depth of a token is that of the position before it
                    cycles = model.last_exit[:, prompts.shape[1] - 1 :].double().mean().item()
        off, on = (batch * length / statistics.median(seconds[exits]) for exits in (False, True))
        results.append({"batch": batch, "off": off, "on": on, "speedup": on / off, "mean_cycles": cycles})
        verdict = "faster" if on >= off else "slower: deciding costs more here than the cycles saved"
        console.print(
            f"batch {batch:>2}: off {off:,.0f}, on {on:,.0f} tokens/s: {on / off:.2f}x, {verdict} "
            f"({cycles:.2f} of {model.config.cycles} cycles a token)"
        )
    return results


def on_text(
    console: Console, model: Any, tokenizer: Any, rule: Any, rows: int = 8, length: int = 128
) -> dict[str, Any]:
    """FLOPs (by torch's counter) and loss on the same text, exits off and on."""
    from zerodraft.ztt.tradeoff import Ruler

    console.rule("The same text read with exits off and on")
    ruler = Ruler(model, book_blocks(tokenizer, rows, length))
    off, on = ruler.full, ruler.measure(rule)
    console.print(
        f"FLOPs per token: {off.flops_per_token:,.0f} off, {on.flops_per_token:,.0f} on: {1 - on.flops:.1%} saved at "
        f"{on.mean_cycles:.2f} of {model.config.cycles} cycles a token\n"
        f"loss per token: {off.loss:.4f} off, {on.loss:.4f} on ({on.relative_increase:+.2%})"
    )
    return {"off": asdict(off), "on": asdict(on), "flops_saved": 1 - on.flops}


def book_blocks(tokenizer: Any, rows: int, length: int) -> Any:
    """Blocks of tokens spread over the smaller of the bundled books."""
    import torch

    ids = tokenizer((BOOKS / "the-time-machine.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    stride = len(ids) // rows
    return torch.tensor([ids[row * stride : row * stride + length] for row in range(rows)])


def train(console: Console, seconds: float, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A Zero Token Transformer and the vanilla model with as many stored layers: same data, steps and schedule."""
    console.rule(f"Two models learn from two books, {seconds / 60:.2g} minutes for both")
    with tempfile.TemporaryDirectory(prefix="zerodraft-demo-") as temporary:
        common = {
            "data.train": [str(BOOKS)],
            "data.cache": f"{temporary}/cache",
            "training.max_minutes": 0.0,
            **overrides,
        }
        step_seconds = {}
        for name in RECIPES:
            console.print(f"measuring the speed of this machine: {TITLES[name]} ...")
            _, step_seconds[name] = train_one(
                console, name, {**common, "output": f"{temporary}/trial-{name}", "data.validation_blocks": 1}, 8
            )
        steps = max(20, int(seconds / sum(step_seconds.values())))
        runs = {}
        for name in RECIPES:
            runs[name], _ = train_one(console, name, {**common, "output": f"{temporary}/{name}"}, steps, bar=True)
        return {"steps": steps, **compare(Path(temporary), runs)}


def train_one(
    console: Console, name: str, overrides: Mapping[str, Any], steps: int, bar: bool = False
) -> tuple[dict[str, Any], float]:
    """The results of one run, and the seconds of a step."""
    from zerodraft.training.recipe import load_recipe
    from zerodraft.training.ztt.run import pretrain

    recipe = load_recipe(RECIPES[name], {**overrides, "training.steps": steps})
    watch = step_watch(console if bar else None, TITLES[name])
    results = pretrain(recipe, callbacks=[watch])
    # the first steps allocate memory
    return results, statistics.mean(watch.durations[2:])


def step_watch(console: Console | None, title: str) -> Any:
    """A Trainer callback that times the steps and shows a live bar (lines, where stdout is no terminal)."""
    from transformers import TrainerCallback

    class StepWatch(TrainerCallback):
        def __init__(self) -> None:
            self.durations: list[float] = []
            self.loss = ""
            columns = (TextColumn(f"{title:<26}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
            self.bar = None if console is None else Progress(*columns, TimeRemainingColumn(), console=console)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()
            if self.bar is not None and console is not None and console.is_terminal:
                self.bar.start()
                self.task = self.bar.add_task("", total=state.max_steps, loss="")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.durations.append(now - self.last)
            self.last = now
            if self.bar is None or console is None:
                return
            if console.is_terminal:
                self.bar.update(self.task, completed=state.global_step, loss=self.loss)
            elif state.global_step % max(1, state.max_steps // 5) == 0:
                console.print(f"{title}: step {state.global_step} of {state.max_steps} {self.loss}".rstrip())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.loss = f"loss {logs['loss']:.3f}"

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is not None and console is not None and console.is_terminal:
                self.bar.stop()

    return StepWatch()


def compare(folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Training and held-back losses of both; for training the mean over the last steps in which all cycles ran."""
    from zerodraft.training.callbacks import read_log

    logs = {name: {row["step"]: row for row in read_log(folder / name / "log.jsonl") if "loss" in row} for name in runs}
    cycles = runs["ztt"]["recipe"]["model"]["cycles"]
    full = [step for step, row in logs["ztt"].items() if row.get("cycles", cycles) == cycles][-40:]
    compared = {}
    for name, results in runs.items():
        evaluation = results["evaluation"]
        by_cycles = [value for key, value in sorted(evaluation.items()) if key.startswith("eval_validation_loss_")]
        compared[name] = {
            "parameters": results["parameters"],
            "train_loss": statistics.mean(logs[name][step]["loss"] for step in full),
            "held_back_loss": by_cycles[-1],
            "held_back_loss_by_cycles": by_cycles,
            "seconds": results["seconds"],
            "tokens": results["tokens"],
            "tokens_per_second": results["tokens_per_second"],
        }
    return compared


def summary(console: Console, result: Mapping[str, Any]) -> None:
    """The figures of the run once more."""
    console.rule("Summary")
    drafts = result["drafts"]
    if "left_out" in drafts:
        console.print(f"DiffuSpec was left out: {drafts['left_out']}\n")
    else:
        sum_up_drafts(console, drafts)
    training = result["training"]
    table = Table("trained here", "parameters", "training loss", "held-back loss", "seconds", "tokens/s", box=None)
    for name, title in TITLES.items():
        row = training[name]
        table.add_row(
            title,
            f"{row['parameters']:,}",
            f"{row['train_loss']:.4f}",
            f"{row['held_back_loss']:.4f}",
            f"{row['seconds']:.0f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    console.print(table)
    difference = training["ztt"]["held_back_loss"] - training["vanilla"]["held_back_loss"]
    verdict = "lower" if difference < 0 else "higher"
    early = training["ztt"]["held_back_loss_by_cycles"]
    console.print(
        f"after {training['steps']} steps on the same data the Zero Token Transformer's held-back loss is "
        f"{abs(difference):.4f} {verdict}; after 1 to {len(early)} of its cycles: "
        f"{', '.join(f'{loss:.4f}' for loss in early)}\n"
    )
    table = Table("early exit, shipped model", "off", "on", "", box=None)
    for row in result["speed"]:
        speeds = (f"{row['off']:,.0f}", f"{row['on']:,.0f}", f"{row['speedup']:.2f}x")
        table.add_row(f"tokens/s at batch {row['batch']}", *speeds)
    off, on = result["text"]["off"], result["text"]["on"]
    saved = f"{result['text']['flops_saved']:.1%} saved"
    table.add_row("FLOPs per token", f"{off['flops_per_token']:,.0f}", f"{on['flops_per_token']:,.0f}", saved)
    table.add_row("cycles per token", f"{off['mean_cycles']:.2f}", f"{on['mean_cycles']:.2f}", "")
    table.add_row("loss", f"{off['loss']:.4f}", f"{on['loss']:.4f}", f"{on['loss_increase']:+.4f}")
    console.print(table)
    console.print(f"everything was measured in this run, which took {result['seconds']:.0f} seconds")


def sum_up_drafts(console: Console, drafts: Mapping[str, Any]) -> None:
    """Tokens per second with drafts, beside transformers' and our own plain decoding."""
    table = Table("DiffuSpec, tokens/s", "transformers", "our plain", "drafts", "faster by", "a pass", box=None)
    for row in (*drafts["answers"], {**drafts, "prompt": "all"}):
        rates = (f"{row[f'{kind}tokens_per_second']:.1f}" for kind in ("plain_", "own_plain_", ""))
        ratios = f"{row['speedup']:.2f}x, {row['speedup_over_own_plain']:.2f}x"
        table.add_row(shorten(row["prompt"], 19, placeholder=" ..."), *rates, ratios, f"{row['mat']:.2f}")
    console.print(table)
    equal = "the same tokens with drafts as plainly" if drafts["equal"] else "[red]other tokens[/red] (see above)"
    console.print(f"{equal}, in all {drafts['new_tokens']}\n")


if __name__ == "__main__":
    sys.exit(main())
