"""What `truth.py` found on a GPU, for `results/` and for the tables of docs/gpu.md.

python benchmarks/gpu/publish.py FOLDER/truth.json results/gpu/truth-h200.json      # prints the tables
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from evidence_text import grid
from zerodraft.common.outputs import write_json

ROOTS = ("tmp", "opt", "work", "root", "home")
FOLDER = re.compile(rf"/(?:{'|'.join(ROOTS)})/(?:[^\s\"',]*/)?")
"""A folder of the machine, or what is directly below one of its roots."""


def published(result: dict[str, Any]) -> dict[str, Any]:
    """The result without folders of the machine and without what processes printed, with profiles as rows."""
    told = json.loads(FOLDER.sub("", json.dumps(result, ensure_ascii=False)))
    for part in told["parts"].values():
        # warnings of libraries
        part.pop("output", None)
        for step in part["steps"].values():
            step.pop("traceback", None)
    for way in _found(told, "profile").values():
        way["tables"] = {side: rows_of(lines) for side, lines in way["tables"].items()}
    return told


def rows_of(lines: list[str]) -> list[dict[str, Any]]:
    """A table of torch's profiler as rows, all in milliseconds."""
    rows = []
    for line in lines:
        *name, _, self_cpu, _, _, _, self_cuda, _, _, _, calls = line.split() if len(line.split()) > 10 else [""] * 10
        if calls.isdecimal():
            times = {"self_cpu_ms": _ms(self_cpu), "self_cuda_ms": _ms(self_cuda)}
            rows.append({"name": " ".join(name), **times, "calls": int(calls)})
        elif line.startswith("Self "):
            what, value = line.split(" time total: ")
            rows.append({"name": f"{what} in all", "total_ms": _ms(value)})
    return rows


def _ms(text: str) -> float:
    scale = {"us": 1e-3, "ms": 1.0}[text[-2:]] if text[-2:] in ("us", "ms") else 1e3
    return round(scale * float(text.rstrip("ums")), 6)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/gpu.md by their names: of what was found, as far as it was."""
    of = {
        "passes": (_passes, "costs, bfloat16"),
        **{f"decode, {dtype}": (_decode, f"methods, {dtype}") for dtype in ("bfloat16", "float32")},
        "time": (_time, "profile"),
    }
    found = {name: (make, _found(result, step)) for name, (make, step) in of.items()}
    return {"parts": _parts(result), **{name: make(known) for name, (make, known) in found.items() if known}}


def _found(result: dict[str, Any], step: str) -> dict[str, Any]:
    """What a step of the decoding found, if it did."""
    return result["parts"].get("decode", {"steps": {}})["steps"].get(step, {}).get("found", {})


def _parts(result: dict[str, Any]) -> str:
    rows = []
    for name, part in result["parts"].items():
        counts = Counter(step["outcome"] for step in part["steps"].values())
        rest = sum(counts.values()) - counts["passed"] - counts["failed"]
        seconds = re.search(r"after (\d+) s", part["state"])
        rows.append([name, *map(str, (counts["passed"], counts["failed"], rest)), seconds[1] if seconds else "skipped"])
    return grid(["part", "passed", "failed", "not ended", "seconds"], rows)


def _passes(found: dict[str, Any]) -> str:
    kinds = ("recorded passes", "passes", "recorded passes, long text", "passes, long text")
    known = {name: found[name] for name in kinds if name in found}
    sizes = list(dict.fromkeys(size for of in known.values() for size in of if size.isdecimal()))
    rows = [[name, *(f"{of[n]['median']:.2f}" if n in of else "" for n in sizes)] for name, of in known.items()]
    return grid(["milliseconds", *sizes], rows)


def _decode(found: dict[str, Any]) -> str:
    head = ["method", "tokens/s", "over `plain`", "tokens a pass", "ms a step of drafting"]
    counted, rows = ("prompts", "equal", "near_ties"), []
    own = found["methods"]["plain"]["tokens_per_second"]
    for name, values in found["methods"].items():
        speed, phases = values["tokens_per_second"], found["phases"].get(name)
        passes = (values["tokens"] - values["prompts"]) / values["mat"]
        drafting = "-" if phases is None else f"{1e3 * phases['draft'] / passes:.1f}"
        counts = (str(values[key]) for key in counted)
        rows.append([name, f"{speed:.1f}", f"{speed / own:.2f}", f"{values['mat']:.2f}", drafting, *counts])
    return grid([*head, *(key.replace("_", " ") for key in counted)], rows)


def _time(found: dict[str, Any]) -> str:
    rows = [["steps", *(str(way["steps"]) for way in found.values())]]
    for phase in ("verify", "draft", "search", "other"):
        rows.append([f"{phase}, ms a step", *(f"{1e3 * w['stats'][phase] / w['steps']:.2f}" for w in found.values())])
    totals = [sum(row.get("total_ms", 0) for row in way["tables"]["device"][-1:]) for way in found.values()]
    rows.append([
        "kernels with the prompt's, ms a step",
        *(f"{total / way['steps']:.2f}" for total, way in zip(totals, found.values(), strict=True)),
    ])  # fmt: skip
    kernels = [[row for row in way["tables"]["device"] if row.get("self_cpu_ms") == 0] for way in found.values()]
    rows.append([
        "launches of the kernels in the profile's first lines, a step",
        *(f"{sum(k['calls'] for k in of) / way['steps']:.0f}" for of, way in zip(kernels, found.values(), strict=True)),
    ])  # fmt: skip
    each = [1e3 * sum(k["self_cuda_ms"] for k in of) / sum(k["calls"] for k in of) for of in kernels]
    rows.append(["microseconds of one of these", *(f"{value:.1f}" for value in each)])
    return grid(["", *found], rows)


def main() -> None:
    """Writes the result and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path)
    parser.add_argument("to", type=Path)
    options = parser.parse_args()
    result = published(json.loads(options.found.read_text(encoding="utf-8")))
    options.to.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.to, result, indent=1)
    for name, table in tables(result).items():
        print(f"{name}\n\n{table}")


if __name__ == "__main__":
    main()
