"""Early exit against full depth: tokens per second and counted FLOPs of the shipped model, by batch size.

python benchmarks/early_exit.py --output results/early-exit.json
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness import arguments, emit, interleave, ratio, spread
from zerodraft import ExitRule, FixedExit, ZttForCausalLM
from zerodraft.ztt.flops import count_flops

MODEL = Path(__file__).parent.parent / "models" / "ztt-million-exits"
PROMPTS = ("The history of the city begins", "In the morning she", "A function that returns", "My lord,")


def main() -> None:
    options = arguments(__doc__ or "", repeats=7, new_tokens=64)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    assert isinstance(model, ZttForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    rules: dict[str, ExitRule | None] = {"full depth": None, "calibrated": model.calibrated_exit_rule()}
    # What a perfect rule could save at this depth: every token stops after the first cycle.
    rules["all after cycle 1"] = FixedExit(cycles=1)
    result: dict[str, Any] = {}
    for batch in (1, 4, 16, 64):
        texts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        flops: dict[str, int] = {}
        depth: dict[str, float] = {}

        def write(rule: ExitRule | None, inputs: Any = inputs) -> None:
            new = options.new_tokens
            model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, exit_rule=rule)

        for name, rule in rules.items():
            with count_flops() as counted, torch.no_grad():
                write(rule)
            flops[name] = counted.total
            exits = model.last_exit
            depth[name] = model.config.cycles if exits is None else exits[exits > 0].float().mean().item()
        seconds = interleave(
            {name: lambda rule=rule: write(rule) for name, rule in rules.items()}, repeats=options.repeats
        )
        tokens = batch * options.new_tokens
        full = seconds["full depth"]
        result[f"batch {batch}"] = {
            name: {
                "tokens_per_second": spread([tokens / s for s in seconds[name]]),
                "speedup": ratio(full, seconds[name]),
                "flops": flops[name],
                "flops_saved": 1 - flops[name] / flops["full depth"],
                "mean_depth": depth[name],
            }
            for name in rules
        }
        for name, row in result[f"batch {batch}"].items():
            print(
                f"batch {batch:3d}  {name:18s} {row['tokens_per_second']['median']:8.1f} tokens/s  "
                f"{row['speedup']['median']:.2f}x  FLOPs saved {row['flops_saved']:.1%}  depth {row['mean_depth']:.2f}",
                file=sys.stderr,
            )
    emit({"benchmark": "early_exit", "model": "models/ztt-million-exits", "results": result}, options)


if __name__ == "__main__":
    main()
