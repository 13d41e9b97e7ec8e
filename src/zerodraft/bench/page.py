"""Results as a Markdown page, for the documentation of a repository."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from zerodraft.bench.tables import (
    KINDS,
    Result,
    Table,
    complete,
    number,
    other_results,
    provenance_table,
    result_tables,
)

HEAD = """# Benchmarks

Written by `zerodraft bench report`; do not edit. What the figures mean and how to measure them is in zerodraft's
`docs/benchmarking.md`.
"""

LEFT_OUT = {"Speedup by prompt, by task", "Tokens per second by task", "Differing tokens", "Acceptance by position"}
"""Tables too wide or too long for this page; the HTML report has them."""


def markdown(results: Mapping[str, Mapping[str, Any]], plots: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The page of results by file name; those of other commands are listed with how they were made. `plots` are links
    to figures by result and title."""
    parts = [HEAD]
    ours = {name: result for name, result in results.items() if result.get("benchmark") in KINDS}
    for name, result in ours.items():
        with complete(name):
            parts += _section(name, result, dict((plots or {}).get(name, {})))
    others = {name: result for name, result in results.items() if name not in ours}
    if others:
        parts += _others(others)
    return "\n".join(parts)


def _section(name: str, result: Result, plots: dict[str, str]) -> Iterator[str]:
    yield f"## {_text(name)}\n"
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
            f"{number(result['speedup_over_hf_best'])}x as its best own method ({_text(result['hf_best'])})"
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
    prompts, mat = result["prompts_measured"], number(result["mat"])
    return f"{_code(result['subject'])} on {prompts} prompts:{speed} MAT {mat}. {equal}\n"


def _others(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "## Other measurements\n"
    yield "| file | command | commit |\n| --- | --- | --- |"
    for name, command, commit in other_results(results).rows:
        yield f"| [{_text(name)}](../results/{quote(name)}.json) | {_code(command)} | {_cell(commit)} |"
    yield ""


def _table(table: Table) -> str:
    header = [name or " " for name in table.header]
    lines = [f"### {_text(table.title)}\n"] + ([_text(table.note) + "\n"] if table.note else [])
    lines += [_row(header), _row(["---"] * len(header)), *(_row(row) for row in table.rows)]
    return "\n".join(lines) + "\n"


def _figure(title: str, link: str) -> str:
    return f"![{_text(title)}]({quote(link)})\n"


def _row(cells: Any) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Markdown lets HTML through, so nothing of a file may look like it."""
    return " ".join(str(text).splitlines()).replace("<", "&lt;")


def _code(text: str) -> str:
    """In backticks, where nothing but a backtick ends."""
    return f"`{' '.join(str(text).splitlines()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
