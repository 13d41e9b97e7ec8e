"""What every benchmark here shares: interleaved timing, median and spread, and one JSON line with its provenance.

Cases are run in turn (A B A B ...), so that a machine whose speed drifts slows all of them; ratios are taken pair by
pair.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import zerodraft

Case = Callable[[], object]


def interleave(cases: dict[str, Case], *, repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run of each case, run in turn and in alternating order."""
    for _ in range(warmup):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats):
        order = list(cases) if repeat % 2 == 0 else list(reversed(cases))
        for name in order:
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and range of the ratios of two cases' runs, pair by pair."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def provenance(seed: int) -> dict[str, Any]:
    """Versions, machine, threads, seed and commit."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return {
        "zerodraft": zerodraft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_end": round(os.getloadavg()[0], 2),
        "seed": seed,
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """The common flags: --threads, --seed, --output and one whole number for each default."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in {"threads": os.cpu_count() or 1, "seed": 0, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    transformers.utils.logging.set_verbosity_error()
    return options


def emit(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result as one JSON line, and write it to `--output`."""
    result = result | {"provenance": provenance(options.seed)}
    if options.output is not None:
        partial = options.output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(partial, options.output)
    print(json.dumps(result))
