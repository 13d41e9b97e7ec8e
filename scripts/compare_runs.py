"""Put the results of several training runs side by side: one JSON file, and a table on the terminal.

Usage: python scripts/compare_runs.py results/ztt-tiny-baselines.json runs/300/ztt-tiny runs/300/ztt-tiny-vanilla ...
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

KEPT = ("command", "seed", "parameters", "steps", "tokens", "seconds", "tokens_per_second", "evaluation")


def main(words: Sequence[str] | None = None) -> None:
    """Reads the arguments and compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    options = parser.parse_args(words)
    runs = {run.name: json.loads((run / "results.json").read_text(encoding="utf-8")) for run in options.runs}
    first = next(iter(runs.values()))
    compared = {
        "versions": first["versions"],
        "machine": first["machine"],
        "runs": {name: {key: results[key] for key in (*KEPT, "recipe")} for name, results in runs.items()},
    }
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, options.output)
    Console().print(table(runs))


def table(runs: dict[str, dict[str, Any]]) -> Table:
    """One row per run: parameters, tokens, and the validation loss after each cycle."""
    shown = Table("run", "parameters", "tokens", "validation loss by cycle", "bits per byte", box=None)
    for name, results in runs.items():
        evaluation = results["evaluation"]
        losses = [f"{loss:.4f}" for key, loss in evaluation.items() if key.startswith("eval_validation_loss_")]
        bits = f"{evaluation['eval_validation_bits_per_byte']:.4f}"
        shown.add_row(name, f"{results['parameters']:,}", f"{results['tokens']:,}", " ".join(losses), bits)
    return shown


if __name__ == "__main__":
    main()
