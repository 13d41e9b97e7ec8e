"""What `make demo` runs: both systems, one after the other.

DiffuSpec: SmolLM2 answers questions with drafts and plainly, the same tokens. Zero Token Transformers: a shipped one
writes, then another one reads next to the vanilla model that learnt from the same text. Every figure that it prints is
measured in this run. Usage: `python examples/demo.py [--json]`.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zerodraft.cli.main import log_to_stderr, no_bars_in_a_pipe
from zerodraft.common.errors import ZerodraftError

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "ztt-million-exits"
BOOKS = ROOT / "examples" / "data"
UNSEEN = ROOT / "examples" / "held-out" / "standard-ebooks.txt"
PAIR = {"ztt": ROOT / "models" / "ztt-million", "vanilla": ROOT / "models" / "vanilla-million"}
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
BLOCKS = 256
"""Of the text that neither model of the pair has seen."""
TURNS = 9
SPEED_SECONDS = 12.0
"""On a slow or busy machine a batch size gets fewer turns than that once this time has passed."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 when done, 2 with one sentence when something that it needs is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a trained and calibrated Zero Token Transformer")
    parser.add_argument("--target", default=TARGET, help="the chat model that decodes with drafts")
    parser.add_argument("--drafter", default="", help="as for 'zerodraft generate'")
    parser.add_argument("--answer-tokens", type=int, default=96, help="length of each answer")
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
        result = {"drafts": drafts, **run(console, options.model, options.new_tokens)}
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


def run(console: Console, path: Path, new_tokens: int) -> dict[str, Any]:
    """All of Zero Token Transformers: text, speed, and a comparison with the vanilla model of equal size."""
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
        "pair": compare(console, PAIR, UNSEEN, BLOCKS),
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
    """Tokens per second with exits off and on, decoded without drafts on the fastest path of the machine: a warm-up,
    then turns, and the median. By one thread: so small a model has little to share out, and on a busy machine threads
    wait for each other."""
    import torch

    from zerodraft.drafters.none import NoDrafter
    from zerodraft.generate.decoder import decoder, own_plain

    console.rule("Tokens per second, exits off and on, one thread")
    decode = own_plain(decoder(model, NoDrafter()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    for batch in batches:
        prompts, length = book_blocks(tokenizer, batch, 32), new_tokens if batch == 1 else max(1, new_tokens // 2)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        cycles = 0.0
        started = time.perf_counter()
        for turn in range(TURNS + 1):
            if turn > 1 and time.perf_counter() - started > SPEED_SECONDS:
                break
            for exits in (False, True):
                before = time.perf_counter()
                model.generate(
                    prompts,
                    attention_mask=prompts.new_ones(prompts.shape),
                    eos_token_id=None,
                    max_new_tokens=length,
                    do_sample=False,
                    exit_rule=rule if exits else None,
                    custom_generate=decode,
                )
                if turn > 0:
                    seconds[exits].append(time.perf_counter() - before)
                if exits:
                    # the depth of a token is that of the position before it
                    cycles = model.last_exit[:, prompts.shape[1] - 1 :].double().mean().item()
        off, on = (batch * length / statistics.median(seconds[exits]) for exits in (False, True))
        results.append({"batch": batch, "off": off, "on": on, "speedup": on / off, "mean_cycles": cycles})
        verdict = "faster" if on >= off else "slower: deciding and keeping depths takes longer than the cycles saved"
        console.print(
            f"batch {batch:>2}: off {off:,.0f}, on {on:,.0f} tokens/s: {on / off:.2f}x, {verdict} "
            f"({cycles:.2f} of {model.config.cycles} cycles a token)"
        )
    torch.set_num_threads(threads)
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


def compare(console: Console, paths: Mapping[str, Path], text: Path, limit: int = 0) -> dict[str, Any]:
    """Losses after each cycle of two models that learnt from the same text, on a text that neither has seen.

    Args:
        console: where it is told.
        paths: the models by their names in `TITLES`.
        text: a file.
        limit: blocks to read at the most; 0 for all.
    """
    from zerodraft.cli.loading import load_ztt
    from zerodraft.models.tokenizers import load_tokenizer
    from zerodraft.training.data import pack_texts

    console.rule("Two models of equal size that read the same text, on pages that neither has seen")
    compared: dict[str, Any] = {}
    for name, path in paths.items():
        if not (path / "config.json").is_file():
            raise ZerodraftError(f"no model at {path}: clone the repository with models/")
        model, folder = load_ztt(str(path))
        length = model.config.max_position_embeddings
        rows = pack_texts([text.read_text(encoding="utf-8")], load_tokenizer(folder), length, limit).rows()
        losses = losses_by_cycle(model, rows)
        compared["tokens"] = rows.numel()
        compared[name] = {
            "name": path.name,
            "parameters": model.num_parameters(),
            "layers": model.config.num_hidden_layers,
            "loss": losses[-1],
            "loss_by_cycle": losses,
        }
        console.print(
            f"{TITLES[name]} ({path.name}): {model.num_parameters():,} parameters, {model.config.num_hidden_layers} "
            f"layers deep, loss {losses[-1]:.4f} on {rows.numel():,} tokens"
        )
    return compared


def losses_by_cycle(model: Any, rows: Any) -> list[float]:
    """Mean loss per token after each cycle, over blocks of tokens `(rows, length)`."""
    import torch

    total: Any = 0
    for ids in rows.split(32):
        with torch.no_grad():
            out = model(ids, labels=ids, cycle_weights=(1.0,) * model.config.cycles)
        total = total + len(ids) * out.cycle_losses.double()
    return (total / len(rows)).tolist()


def summary(console: Console, result: Mapping[str, Any]) -> None:
    """The figures of the run once more."""
    console.rule("Summary")
    drafts = result["drafts"]
    if "left_out" in drafts:
        console.print(f"DiffuSpec was left out: {drafts['left_out']}\n")
    else:
        sum_up_drafts(console, drafts)
    pair = result["pair"]
    table = Table("equal parameters, equal text", "parameters", "layers deep", "loss", "after each cycle", box=None)
    for name, title in TITLES.items():
        row = pair[name]
        by_cycle = ", ".join(f"{loss:.4f}" for loss in row["loss_by_cycle"])
        table.add_row(title, f"{row['parameters']:,}", str(row["layers"]), f"{row['loss']:.4f}", by_cycle)
    console.print(table)
    difference = pair["ztt"]["loss"] - pair["vanilla"]["loss"]
    console.print(
        f"on {pair['tokens']:,} tokens that neither has seen the loss of the Zero Token Transformer is "
        f"{abs(difference):.4f} {'lower' if difference < 0 else 'higher'}; docs/evidence.md has all seeds\n"
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
    console.print("to see it in a browser: .venv/bin/zerodraft serve smollm2, and open the address that it names")


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
