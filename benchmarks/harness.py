"""What the scripts here share: the common flags, and one JSON line with its provenance (`zerodraft.bench.measure`)."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from zerodraft.bench.measure import Case, interleave, provenance, ratio, spread, write_result

__all__ = [
    "Case",
    "added_cost",
    "arguments",
    "emit",
    "interleave",
    "parser_of",
    "quiet_transformers",
    "ratio",
    "settle",
    "spread",
]


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """The common flags: --threads, --seed, --output and one whole number for each default."""
    return settle(parser_of(description, **defaults))


def parser_of(description: str, **defaults: int) -> argparse.ArgumentParser:
    """A parser with the common flags, for scripts that have more."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in {"threads": os.cpu_count() or 1, "seed": 0, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    return parser


def settle(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given, with threads, seed and other libraries' messages settled."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    quiet_transformers()
    return options


def added_cost(without: Case, having: Case, *, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a run without something and of one that has it, in turn after three of each, and the ratio of the
    second to the first, pair by pair."""
    seconds = interleave({"without": without, "with": having}, repeats=repeats, warmup=3)
    times = {f"{name}_ms": spread([1e3 * s for s in of]) for name, of in seconds.items()}
    return {**times, "ratio": ratio(seconds["with"], seconds["without"])}


def quiet_transformers() -> None:
    """No warnings of transformers, and no bars while it loads."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def emit(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result as one JSON line, and write it to `--output`."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    result = result | {"provenance": provenance(seed=options.seed, words=words)}
    if options.output is not None:
        write_result(options.output, result)
    print(json.dumps(result))
