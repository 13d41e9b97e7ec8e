"""Decoding methods against each other on real prompts: seconds, tokens per pass of the target, and equality of tokens.

All methods run on one prompt before the next prompt begins, in changing order, so that a machine whose speed drifts
slows all of them. Tokens are counted by ids. Greedy tokens of every method are compared with those of transformers'
plain `generate`; where they differ, the two best logits at the first difference are listed: closer than 1e-3 it is
rounding.

Finished prompts are kept in a `.rows.jsonl` beside `--output`, from which an interrupted run goes on.

    python benchmarks/decoding.py --limit 30 --output results/decoding.json
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from harness import emit
from zerodraft import DiffuSpec
from zerodraft.cli.decoding import first_difference, load_target, shipped_drafter, top_gap
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.search import SearchConfig
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.targets.lean import lean_target

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
NEAR_TIE = 1e-3


class NoDrafter:
    """Drafts nothing: our engine's plain decoding."""

    taps = ()
    max_length = 1

    def check(self, config: Any) -> None:
        """Fits every target."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "NoDrafter":
        """Has no state."""
        return self

    def observe(self, progress: Any) -> None:
        """Learns nothing."""

    def propose(self, lengths: Any) -> list[Lattice]:
        """Nothing, for every row."""
        return [Lattice.empty() for _ in lengths]


def methods(model: Any, drafter: Path, budget: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Arguments of `generate` by the method's name, made when asked for."""
    loaded: list[BlockDrafter] = []

    def block() -> BlockDrafter:
        if not loaded:
            loaded.append(BlockDrafter.from_pretrained(drafter, model))
        return loaded[0]

    def ours(drafter: Any, lean: bool = True, **options: Any) -> dict[str, Any]:
        return {"custom_generate": DiffuSpec(drafter, make_target=lean_target if lean else None, **options)}

    def tree(nodes: int, lean: bool = True) -> dict[str, Any]:
        search = SearchConfig(tau=0.95, m_max=8, expand="best_first", budget=nodes)
        return ours(block(), lean, length=FixedLength(block().max_length), search=search)

    def path(lean: bool = True) -> dict[str, Any]:
        return ours(block(), lean, length=FixedLength(block().max_length), search=SearchConfig(m_max=1), tree=False)

    return {
        "hf_plain": dict,
        "hf_lookup": lambda: {"prompt_lookup_num_tokens": 10},
        "plain": lambda: ours(NoDrafter()),
        "lookup": lambda: ours(PromptLookupDrafter(), length=FixedLength(8)),
        "lookup_hf": lambda: ours(PromptLookupDrafter(), False, length=FixedLength(8)),
        "block_path": path,
        "block_path_hf": lambda: path(lean=False),
        "block_tree": lambda: tree(budget),
        "block_tree_hf": lambda: tree(budget, lean=False),
    }


def read_prompts(path: Path, limit: int, seed: int) -> list[tuple[str, str, str]]:
    """(id, task, text) of the first turns, `limit` of them spread over the tasks (0: all)."""
    tasks: dict[str, list[tuple[str, str, str]]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            task = "mt_bench" if row["category"] in MT_BENCH else row["category"]
            tasks.setdefault(task, []).append((str(row["question_id"]), task, row["turns"][0]))
    if limit:
        dice = random.Random(seed)
        share = -(-limit // len(tasks))
        tasks = {task: dice.sample(rows, min(share, len(rows))) for task, rows in tasks.items()}
    rounds = [rows[i] for i in range(max(map(len, tasks.values()))) for rows in tasks.values() if i < len(rows)]
    return rounds[:limit] if limit else rounds


def run_prompt(model: Any, inputs: Any, chosen: dict[str, dict[str, Any]], order: list[str], length: int) -> Any:
    """Seconds, tokens and tokens per pass of every method on one prompt."""
    found = {}
    start = inputs["input_ids"].shape[1]
    for name in order:
        began = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=length, do_sample=False, **chosen[name])
        row: dict[str, Any] = {"seconds": time.perf_counter() - began, "tokens": out[0, start:].tolist()}
        if spec := chosen[name].get("custom_generate"):
            row |= {"mat": spec.last_stats.mat, "stats": spec.last_stats.to_dict()}
        found[name] = row
    return found


def summarise(rows: list[dict[str, Any]], names: list[str], base: str) -> dict[str, Any]:
    """Per method: speed over the base by total time and by prompt, tokens per pass, equality."""
    summary = {}
    for name in names:
        seconds = [row["methods"][name]["seconds"] for row in rows]
        tokens = [row["methods"][name]["count"] for row in rows]
        ratios = [
            row["methods"][base]["seconds"] / s * t / row["methods"][base]["count"]
            for row, s, t in zip(rows, seconds, tokens, strict=True)
        ]
        base_speed = sum(row["methods"][base]["count"] for row in rows) / sum(
            row["methods"][base]["seconds"] for row in rows
        )
        mats = [row["methods"][name]["mat"] for row in rows if "mat" in row["methods"][name]]
        summary[name] = {
            "tokens_per_second": sum(tokens) / sum(seconds),
            "speedup": sum(tokens) / sum(seconds) / base_speed,
            "speedup_by_prompt": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "mat": statistics.mean(mats) if mats else None,
            "equal": sum(row["methods"][name]["equal"] for row in rows),
            "near_ties": sum(row["methods"][name].get("top_gap", 1.0) < NEAR_TIE for row in rows),
            "prompts": len(rows),
        }
    return summary


def kept_rows(path: Path | None) -> Iterator[dict[str, Any]]:
    """What an interrupted run has left."""
    if path is not None and path.is_file():
        for line in path.read_text().split("\n")[:-1]:
            yield json.loads(line)


def main() -> None:
    """Parses flags, runs what is missing, prints the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--drafter", type=Path, help="default: the shipped one")
    parser.add_argument("--prompts", type=Path, help="Spec-Bench questions; default: those of $ZERODRAFT_DATA")
    parser.add_argument("--methods", default="hf_plain,hf_lookup,plain,lookup,block_path,block_tree,block_tree_hf")
    parser.add_argument("--limit", type=int, default=30, help="prompts, spread over the tasks; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--budget", type=int, default=15, help="nodes of the tree")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    here = Path(__file__).resolve().parents[1]
    data = Path(os.environ.get("ZERODRAFT_DATA", here.parent / "shared" / "data"))
    prompts = read_prompts(options.prompts or data / "prompts" / "spec_bench_dev.jsonl", options.limit, options.seed)
    names = options.methods.split(",")

    model, tokenizer = load_target(options.target)
    drafter = options.drafter or shipped_drafter(options.target) or Path("models/none")
    known = methods(model, drafter, options.budget)
    chosen = {name: known[name]() for name in names}
    keep = options.output and options.output.with_suffix(".rows.jsonl")
    rows = list(kept_rows(keep))
    done = {row["id"] for row in rows}
    for number, (identity, task, text) in enumerate(prompts):
        if identity in done:
            continue
        message = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        if not rows and number == 0:
            run_prompt(model, inputs, chosen, names, 16)  # to warm up
        order = names[number % len(names) :] + names[: number % len(names)]
        found = run_prompt(model, inputs, chosen, order, options.max_new_tokens)
        expected = found[names[0]]["tokens"]
        for row in found.values():
            tokens = row.pop("tokens")
            row |= {"count": len(tokens), "equal": tokens == expected}
            if not row["equal"]:
                place = first_difference(tokens, expected)
                row |= {"first_difference": place, "top_gap": top_gap(model, inputs, expected[:place])}
        rows.append({"id": identity, "task": task, "prompt_tokens": inputs["input_ids"].shape[1], "methods": found})
        if keep:
            with keep.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        now = summarise(rows, names, names[0])
        told = ", ".join(f"{name} {values['speedup']:.2f}x ({values['equal']})" for name, values in now.items())
        print(f"{len(rows)}/{len(prompts)} {task}: {told}", flush=True)

    tasks = {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)}
    result = {
        "benchmark": "decoding",
        "target": options.target,
        "max_new_tokens": options.max_new_tokens,
        "base": names[0],
        "overall": summarise(rows, names, names[0]),
        "by_task": {task: summarise(part, names, names[0]) for task, part in tasks.items()},
        "differences": [
            {"id": row["id"], "method": name, "place": found["first_difference"], "top_gap": found["top_gap"]}
            for row in rows
            for name, found in row["methods"].items()
            if not found["equal"]
        ],
    }
    emit(result, options)
    if keep:
        keep.unlink()


if __name__ == "__main__":
    main()
