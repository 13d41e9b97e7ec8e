"""Results as a Markdown page, for the documentation of a repository."""

from collections.abc import Iterator, Mapping
from typing import Any

from zerodraft.bench.tables import KINDS, Result, Table, number, provenance_table, result_tables

HEAD = """# Benchmarks

Written by `zerodraft bench report results/*.json --out docs/benchmarks.md --plots docs/figures` from the results in
this repository; do not edit. What the figures mean and how to measure them: [benchmarking.md](benchmarking.md).
"""

LEFT_OUT = {"Speedup by prompt, by task", "Tokens per second by task", "Differing tokens", "Acceptance by position"}
"""Tables too wide or too long for this page; the HTML report has them."""


def markdown(results: Mapping[str, Mapping[str, Any]], plots: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The page of results by file name; those of other commands are listed with how they were made. `plots` are links
    to figures by result and title."""
    parts = [HEAD]
    ours = {name: result for name, result in results.items() if result.get("benchmark") in KINDS}
    for name, result in ours.items():
        parts += _section(name, result, dict((plots or {}).get(name, {})))
    others = {name: result for name, result in results.items() if name not in ours}
    if others:
        parts += _others(others)
    return "\n".join(parts)


def _section(name: str, result: Result, plots: dict[str, str]) -> Iterator[str]:
    yield f"## {name}\n"
    if result["benchmark"] == "decode":
        yield _headline(result)
    for table in result_tables(result):
        if table.title not in LEFT_OUT:
            yield _table(table)
        if table.title in plots:
            yield _figure(table.title, plots.pop(table.title))
    for title, link in plots.items():
        yield _figure(title, link)
    yield _table(provenance_table(result))


def _headline(result: Result) -> str:
    if result["speedup_over_hf_plain"] is None:
        speed = ""
    else:
        speed = (
            f" {number(result['speedup_over_hf_plain'])}x as fast as transformers' plain decoding, "
            f"{number(result['speedup_over_hf_best'])}x as its best own method ({result['hf_best']})"
        )
        if result["speedup_over_own_plain"] is not None:
            speed += f", {number(result['speedup_over_own_plain'])}x as our own plain decoding"
        speed += "."
    equal = {
        True: "All our methods wrote the tokens of plain decoding"
        + ("." if result["identical"] else ", near ties aside."),
        False: "**Not all our methods wrote the tokens of plain decoding.**",
        None: "Tokens were not compared.",
    }[result["equal"]]
    return (
        f"`{result['subject']}` on {result['prompts_measured']} prompts:{speed} MAT {number(result['mat'])}. {equal}\n"
    )


def _others(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "## Other measurements\n"
    yield "| file | command | commit |\n| --- | --- | --- |"
    for name, result in results.items():
        told = result.get("provenance", result)
        command, commit = str(told.get("command", "-")), str(told.get("commit") or "-")
        yield f"| [{name}](../results/{name}.json) | `{_cell(command)}` | {commit[:10]} |"
    yield ""


def _table(table: Table) -> str:
    header = [name or " " for name in table.header]
    lines = [f"### {table.title}\n"] + ([table.note + "\n"] if table.note else [])
    lines += [_row(header), _row(["---"] * len(header)), *(_row(row) for row in table.rows)]
    return "\n".join(lines) + "\n"


def _figure(title: str, link: str) -> str:
    return f"![{title}]({link})\n"


def _row(cells: Any) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
