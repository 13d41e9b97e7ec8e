"""One HTML page of results, with everything in it: tables, figures as data URIs, the results themselves as JSON.

It asks for nothing from anywhere and prints well. What is modelled rather than measured has a page of its own, whose
costs can be changed where the browser runs scripts.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from zerodraft.bench.plots import decode_plots, kernel_plots
from zerodraft.bench.tables import (
    KINDS,
    Result,
    Table,
    complete,
    number,
    other_results,
    prompt_tables,
    provenance_table,
    result_tables,
    what_if_table,
)
from zerodraft.bench.whatif import EXAMPLE, SCRIPT, Costs

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True, slots=True)
class Figure:
    """A PNG in base 64."""

    title: str
    image: str


def page(results: Mapping[str, Result], costs: Costs = EXAMPLE) -> str:
    """The HTML of results by their names, and what they would mean on a machine with these costs to begin with."""
    sections, modelled, prompts = [], [], []
    for name, result in results.items():
        if result.get("benchmark") not in KINDS:
            continue
        with complete(name):
            subject, is_decode = result.get("subject"), result["benchmark"] == "decode"
            head = _head(result) if is_decode else None
            sections.append({"name": name, "subject": subject, "head": head, "parts": [*_parts(result)]})
            if result.get("steps"):
                modelled.append((name, subject, what_if_table(result, costs)))
            if is_decode:
                prompts.append((name, prompt_tables(result)))
    others = {name: result for name, result in results.items() if result.get("benchmark") not in KINDS}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["unbroken"] = _unbroken
    environment.policies["json.dumps_kwargs"] = {}  # in the order of the files
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        sections=sections,
        others=other_results(others) if others else None,
        modelled=modelled,
        costs=costs,
        prompts=prompts,
        results={name: result for name, result in results.items() if name not in others},
        script=SCRIPT.read_text(encoding="utf-8"),
    )


def plots_of(result: Result) -> dict[str, bytes]:
    """The figures of a result, PNG by title."""
    return {"decode": decode_plots, "kernels": kernel_plots}.get(result["benchmark"], lambda _: {})(result)


def _parts(result: Result) -> Iterator[Table | Figure]:
    """Tables, each with the figure of its title behind it, then the other figures."""
    figures = {title: Figure(title, base64.b64encode(png).decode("ascii")) for title, png in plots_of(result).items()}
    for table in result_tables(result):
        yield table
        if table.title in figures:
            yield figures.pop(table.title)
    yield from figures.values()
    yield provenance_table(result)


def _head(result: Result) -> dict[str, Any]:
    """What was measured, and its main figures."""
    settings = result["settings"]
    tiles = {
        "over transformers' plain decoding": number(result["speedup_over_hf_plain"], 2, "x"),
        f"over its best own method ({result['hf_best']})": number(result["speedup_over_hf_best"], 2, "x"),
        "over our own plain decoding": number(result["speedup_over_own_plain"], 2, "x"),
        "tokens per pass (MAT)": number(result["mat"]),
        "outputs equal": {True: "yes", False: "NO", None: "-"}[result["equal"]],
        "prompts": result["prompts_measured"],
    }
    return {
        "target": settings["target"],
        "drafter": settings["drafter"],
        "chosen": f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy",
        "longest": settings["max_new_tokens"],
        "tiles": tiles,
    }


def _unbroken(text: str) -> str:
    """A spread breaks before its range alone."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("]\N{NO-BREAK SPACE}(", "] (") if "] (" in text else text
