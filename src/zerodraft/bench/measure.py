"""What every measurement shares: interleaved timing, median and spread, provenance, results written whole.

Cases are run in turn (A B A B ...), so that a machine whose speed drifts slows all of them; ratios are taken pair by
pair.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zerodraft.common.machine import memory_bytes
from zerodraft.common.outputs import write_whole
from zerodraft.common.provenance import versions
from zerodraft.fast import compiled
from zerodraft.models.cache import sha256_of

Case = Callable[[], object]
ROOT = Path(__file__).resolve().parents[3]
"""The checkout, if this package runs from one."""


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


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of two cases' runs, pair by pair."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def provenance(*, seed: int, words: Sequence[str], sha256: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Versions, machine, threads, seed, files, commit and command, for a result to be measured again.

    Args:
        seed: Of all random choices.
        words: The command line; what it says about this machine's directories is left out.
        sha256: `fingerprint` of the files that were measured with, by what they are.
    """
    return {
        "versions": versions(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": memory_gib(),
        "kernels": kernels(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_end": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "seed": seed,
        "sha256": dict(sha256 or {}),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src", "models")),
        "command": shlex.join(_portable(word) for word in words),
    }


def kernels() -> str:
    """Whether the lean path has compiled kernels here, and how wide their vectors are."""
    found = compiled.kernels()
    return "none" if found is None else f"compiled, {found.lanes} lanes"


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").split("\n") if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def memory_gib() -> float | None:
    """The machine's memory."""
    memory = memory_bytes()
    return None if memory is None else round(memory / 2**30, 1)


def fingerprint(files: Iterable[Path]) -> str:
    """The first 16 digits of what `cat FILES | sha256sum` prints."""
    return sha256_of(*files)[:16]


def weights(path: Path) -> list[Path]:
    """The files with a model's weights: those in its directory, or the path itself."""
    if not path.is_dir():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))


def write_result(path: Path, result: Any) -> None:
    """Writes a result in the form of `dumps`."""
    write_whole(path, dumps(result) + "\n")


def dumps(value: Any, indent: int = 0) -> str:
    """JSON with a line for each container that holds no other, so that rows of figures are lines."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    if not any(isinstance(item, (dict, list, tuple)) and item for item in items):
        return json.dumps(value)
    pad = " " * (indent + 1)
    inner = [dumps(item, indent + 1) for item in items]
    if isinstance(value, dict):
        inner = [f"{json.dumps(str(key))}: {text}" for key, text in zip(value, inner, strict=True)]
        opening, closing = "{", "}"
    else:
        opening, closing = "[", "]"
    return opening + "\n" + ",\n".join(pad + text for text in inner) + "\n" + " " * indent + closing


def _git(*words: str) -> str | None:
    if not (ROOT / ".git").exists():
        return None
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _portable(word: str) -> str:
    """A word of the command line without this machine's directories."""
    name, equals, value = ("", "", word) if Path(word).is_absolute() else word.partition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    data = os.environ.get("ZERODRAFT_DATA")
    for root, shown in ((Path.cwd(), ""), (Path(data) if data else ROOT, "$ZERODRAFT_DATA/" if data else "")):
        if path.is_relative_to(root):
            return name + equals + shown + path.relative_to(root).as_posix()
    return name + equals + path.name
