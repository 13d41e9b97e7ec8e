"""Turn a finished training run into a model folder that can be shipped: weights, tokenizer, card, and loss curve.

Usage: python scripts/publish_run.py runs/ztt-tiny models/ztt-tiny results/ztt-tiny.json

Everything on the card is read from the run's `results.json` and `log.jsonl`, so it cannot disagree with them.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import zerodraft  # noqa: F401  # registers the model with transformers
from zerodraft.training.callbacks import read_log

mpl.use("Agg")
from matplotlib import pyplot as plt

PROMPTS = ("The cell membrane", "It was a dark night, and", "In this chapter, you will learn")

CARD = """---
license: apache-2.0
language: en
library_name: zerodraft
pipeline_tag: text-generation
tags: [zero-token-transformer, early-exit, layer-sharing]
---
# {name}

A Zero Token Transformer trained from scratch on {megatokens:.1f} million tokens: {stored} stored layers ({head} head,
{shared} shared, {tail} tail) whose shared block runs {cycles} times, so that the full depth is {depth}. {parameters:,}
parameters, vocabulary {vocabulary}, context {context}. It shows how the method works and writes English-like text; it
knows nothing that one could rely on.

```python
import zerodraft
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=True, top_p=0.9)[0]))
```

## Results

Perplexity per token after each number of cycles, over {evaluated} blocks of {context} tokens, and bits per byte at full
depth:

{table}

WikiText-2 is the `<unk>` form with spaces around punctuation, unlike anything in the training text. These figures, with
versions and the whole recipe, are in `{results}`.

![Loss curve](curve.png)

## How it was trained

```
{command}
```

Seed {seed}, {steps} steps of {batch_tokens} tokens, {optimizer}, {threads} CPU thread(s); torch {torch}, transformers
{transformers}.{resumed} The loss was that of a random number of cycles in each step (probabilities {weights}); in
{token_depths:.0%} of the steps every token had a depth of its own.

## Text that it has seen

| corpus | licence |
| --- | --- |
| 18 OpenStax textbooks | CC BY 4.0, attribution: OpenStax, Rice University; free at https://openstax.org |
| 26 books from Standard Ebooks | public domain in the US; the edition's own work CC0 1.0 |
| prose of Python's PEPs | public domain / CC0 1.0 |
| Tiny Shakespeare | public domain |

WikiText-2 (CC BY-SA 3.0) was used to measure, not to train.

## Samples

Full depth, top-p 0.9, seed 0, not selected; the prompt is in bold.

{samples}
"""


def main(words: Sequence[str] | None = None) -> None:
    """Reads the arguments and publishes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("model", type=Path, help="folder to write, replaced if it is there")
    parser.add_argument("results", type=Path, help="JSON file to write")
    options = parser.parse_args(words)
    results = json.loads((options.run / "results.json").read_text(encoding="utf-8"))
    log = read_log(options.run / "log.jsonl")
    options.model.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=options.model.parent, prefix=".partial-"))
    partial.chmod(0o755)
    shutil.copytree(options.run / "model", partial, dirs_exist_ok=True)
    draw_curve(log, partial / "curve.png")
    card = write_card(results, options, sample(partial))
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in partial.iterdir():
        file.chmod(0o644)
    shutil.rmtree(options.model, ignore_errors=True)
    os.replace(partial, options.model)
    temporary = options.results.with_suffix(".partial")
    kept = {**results, "curve": curve_points(log)}
    temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, options.results)


def curve_points(log: Sequence[dict[str, Any]], window: int = 50) -> list[dict[str, float]]:
    """Mean training loss of every `window` steps."""
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    chunks = [losses[start : start + window] for start in range(0, len(losses), window)]
    return [{"step": chunk[-1][0], "loss": sum(loss for _, loss in chunk) / len(chunk)} for chunk in chunks]


def draw_curve(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss (means of 50 steps) and validation loss after each cycle."""
    figure, axes = plt.subplots(figsize=(7, 4))
    points = curve_points(log)
    axes.plot([p["step"] for p in points], [p["loss"] for p in points], color="0.6", label="training, mean of 50 steps")
    evaluations = [row for row in log if "eval_validation_loss_1" in row]
    for cycle in range(1, 10):
        key = f"eval_validation_loss_{cycle}"
        if evaluations and key in evaluations[0]:
            axes.plot(
                [row["step"] for row in evaluations],
                [row[key] for row in evaluations],
                "o--",
                label=f"validation after cycle {cycle}",
            )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def sample(folder: Path) -> str:
    """One continuation of each prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        set_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            **inputs, max_new_tokens=70, do_sample=True, top_p=0.9, pad_token_id=tokenizer.pad_token_id
        )
        text = tokenizer.decode(out[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(f"> **{prompt}**{' '.join(text.split('  ')).replace(chr(10), ' ')}")
    return "\n\n".join(texts)


def write_card(results: dict[str, Any], options: argparse.Namespace, samples: str) -> str:
    """The model card."""
    recipe, evaluation = results["recipe"], results["evaluation"]
    model, training = recipe["model"], recipe["training"]
    cycles = range(1, model["cycles"] + 1)
    names = [key.removeprefix("eval_").removesuffix("_bits_per_byte") for key in evaluation if "bits_per_byte" in key]
    rows = [
        f"| text | {' | '.join(f'{c} cycles' for c in cycles)} | bits per byte |",
        "| --- |" + " --- |" * (len(cycles) + 1),
    ]
    for name in names:
        values = [f"{evaluation[f'eval_{name}_perplexity_{c}']:.1f}" for c in cycles]
        rows.append(f"| {name} | {' | '.join(values)} | {evaluation[f'eval_{name}_bits_per_byte']:.3f} |")
    shared = model["num_hidden_layers"] - model["head_layers"] - model["tail_layers"]
    resumed = f" The run was killed once and resumed from {results['resumed_from']}." if results["resumed_from"] else ""
    return CARD.format(
        name=options.model.name,
        folder=options.model.as_posix(),
        results=options.results.as_posix(),
        prompt=PROMPTS[0],
        megatokens=results["tokens"] / 1e6,
        stored=model["num_hidden_layers"],
        head=model["head_layers"],
        shared=shared,
        tail=model["tail_layers"],
        cycles=model["cycles"],
        depth=model["head_layers"] + model["cycles"] * shared + model["tail_layers"],
        parameters=results["parameters"],
        vocabulary=recipe["tokenizer"]["vocab_size"],
        context=recipe["data"]["context_length"],
        evaluated=recipe["data"]["validation_blocks"],
        table="\n".join(rows),
        command=results["command"].removesuffix(" --resume"),
        seed=results["seed"],
        steps=results["steps"],
        batch_tokens=training["batch_size"] * training["accumulation"] * recipe["data"]["context_length"],
        optimizer={"muon": "Muon and AdamW", "adamw": "AdamW"}[training["optimizer"]],
        threads=results["machine"]["threads"],
        torch=results["versions"]["torch"],
        transformers=results["versions"]["transformers"],
        resumed=resumed,
        weights=", ".join(map(str, recipe["loss"]["weights"])),
        token_depths=recipe["loss"]["token_depths"],
        samples=samples,
    )


if __name__ == "__main__":
    main()
