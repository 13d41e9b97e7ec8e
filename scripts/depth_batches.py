"""Publishes the throughput of batches over depth: the table in docs/early-exit.md and docs/figures/depth-batches.png.

python benchmarks/depth_batches.py --threads 1 --output results/depth-batches.json
python scripts/depth_batches.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zerodraft.common.outputs import write_whole
from zerodraft.ztt.plot import check_matplotlib, save_figure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "early-exit.md"
FIGURE = ROOT / "docs" / "figures" / "depth-batches.png"
RESULT = ROOT / "results" / "depth-batches.json"
BEGIN, END = "<!-- written by scripts/depth_batches.py -->", "<!-- end of what scripts/depth_batches.py wrote -->"
METHODS = ("full depth", "in step", "over depth")


def main() -> None:
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_whole(PAGE, before + BEGIN + "\n\n" + table(measured) + "\n" + END + after)
    draw(by_rows(measured))


def by_rows(measured: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What was measured, by the number of requests at once."""
    return {int(rows): of for rows, of in measured["results"].items() if rows.isdigit()}


def table(measured: Mapping[str, Any]) -> str:
    """The page's table."""
    found, where = by_rows(measured), measured["provenance"]
    lines = [
        f"`{where['command']}`, one thread; torch {where['versions']['torch']}. All measurements: "
        "[results/depth-batches.json](../results/depth-batches.json).",
        "",
        "![Tokens per second over the number of requests at once](figures/depth-batches.png)",
        "",
        f"| requests at once | {' | '.join(METHODS)} | over depth / full depth | bound | over depth / in step |",
        f"| --- |{' --- |' * (len(METHODS) + 3)}",
    ]
    for rows, of in found.items():
        rates = [f"{of['tokens_per_second'][name]['max']:.0f}" for name in METHODS]
        gains = [of["gain_over_full_depth"], of["bound"], of["gain_over_in_step"]]
        lines.append(f"| {rows} | {' | '.join(rates)} | {' | '.join(f'{gain:.2f}x' for gain in gains)} |")
    return "\n".join(lines) + "\n"


def draw(found: Mapping[int, Mapping[str, Any]]) -> None:
    """Tokens per second of each method, and what the bound makes of full depth."""
    check_matplotlib()
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 3.6), dpi=140, layout="constrained")
    axes = drawn.add_subplot()
    rates = {name: [of["tokens_per_second"][name]["max"] for of in found.values()] for name in METHODS}
    for name, marker in zip(METHODS, "os^", strict=True):
        axes.plot(list(found), rates[name], marker=marker, markersize=4, linewidth=1.2, label=name)
    bound = [rate * of["bound"] for rate, of in zip(rates["full depth"], found.values(), strict=True)]
    axes.plot(list(found), bound, "--", color="0.6", linewidth=1.0, label="bound")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), [str(rows) for rows in found])
    axes.set(xlabel="requests at once", ylabel="tokens per second", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    save_figure(FIGURE, drawn)


if __name__ == "__main__":
    main()
