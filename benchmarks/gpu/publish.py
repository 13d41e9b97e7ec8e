"""What `truth.py` found on a GPU, for `results/` and for the tables of docs/gpu.md.

python benchmarks/gpu/publish.py FOLDER/truth.json results/gpu/truth-h200.json      # prints the tables
"""

import argparse
import ast
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from zerodraft.common.outputs import write_json

FOLDER = re.compile(r"/(?:tmp|opt|work|root|home)/[^\s\"',]*/")
RAISED = "AssertionError: "


def published(result: dict[str, Any]) -> dict[str, Any]:
    """The result without folders of the machine, with profiles as rows, and with what failed steps had found."""
    told = json.loads(FOLDER.sub("", json.dumps(result, ensure_ascii=False)))
    for part in told["parts"].values():
        # warnings of libraries
        part.pop("output", None)
        for step in part["steps"].values():
            *_, last = step.pop("traceback", [""])
            if last.startswith(RAISED + "{"):
                step |= {"error": RAISED[:-2], "found": ast.literal_eval(last.removeprefix(RAISED))}
    for way in told["parts"]["decode"]["steps"]["profile"]["found"].values():
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
    """The tables of docs/gpu.md by their names."""
    steps = result["parts"]["decode"]["steps"]
    return {
        "parts": _parts(result),
        "passes": _passes(steps["costs, bfloat16"]["found"]),
        **{f"decode, {dtype}": _decode(steps[f"methods, {dtype}"]["found"]) for dtype in ("bfloat16", "float32")},
        "time": _time(steps["profile"]["found"]),
    }


def _table(*rows: list[str]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def _parts(result: dict[str, Any]) -> str:
    rows = [["part", "passed", "failed", "not ended", "seconds"]]
    for name, part in result["parts"].items():
        counts = Counter(step["outcome"] for step in part["steps"].values())
        rest = sum(counts.values()) - counts["passed"] - counts["failed"]
        seconds = re.search(r"after (\d+) s", part["state"])
        rows.append([name, *map(str, (counts["passed"], counts["failed"], rest)), seconds[1] if seconds else "skipped"])
    return _table(*rows)


def _passes(found: dict[str, Any]) -> str:
    sizes = [size for size in found["passes"] if size.isdecimal()]
    rows = [["milliseconds", *sizes]]
    for name in ("recorded passes", "passes", "recorded passes, long text", "passes, long text"):
        rows.append([name, *(f"{found[name][n]['median']:.2f}" if n in found[name] else "" for n in sizes)])
    return _table(*rows)


def _decode(found: dict[str, Any]) -> str:
    rows = [
        [
            "method",
            "tokens/s",
            "over `plain`",
            "tokens a pass",
            "ms a step of drafting",
            "prompts",
            "equal",
            "near ties",
        ]
    ]
    own = found["methods"]["plain"]["tokens_per_second"]
    for name, values in found["methods"].items():
        speed, phases = values["tokens_per_second"], found["phases"].get(name)
        passes = (values["tokens"] - values["prompts"]) / values["mat"]
        drafting = "-" if phases is None else f"{1e3 * phases['draft'] / passes:.1f}"
        counts = (values[key] for key in ("prompts", "equal", "near_ties"))
        rows.append([name, f"{speed:.1f}", f"{speed / own:.2f}", f"{values['mat']:.2f}", drafting, *map(str, counts)])
    return _table(*rows)


def _time(found: dict[str, Any]) -> str:
    rows = [["", *found]]
    rows.append(["steps", *(str(way["steps"]) for way in found.values())])
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
    return _table(*rows)


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
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
