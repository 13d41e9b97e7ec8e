"""One HTML page of results, with everything in it: tables, figures as data URIs, the results themselves as JSON.

It asks for nothing from anywhere and prints well. What is modelled rather than measured has a page of its own, whose
costs can be changed where the browser runs scripts.
"""

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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

STYLE = """
:root { color-scheme: light; --ink: #22272e; --soft: #5f6b7a; --line: #d8dee6; --accent: #00798c; --model: #9a5b00; }
body { font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: var(--ink); background: #fff;
  max-width: 68rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; } p { max-width: 48rem; margin: .4rem 0; }
.soft, figcaption, .note { color: var(--soft); font-size: .87rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem 1rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.5rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { border-bottom: 2px solid var(--line); } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td.text, th.text { text-align: left; } tr.subject td { background: #eef6f7; font-weight: 600; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; }
nav a { margin-right: 1rem; color: var(--accent); }
.modelled { border: 2px dashed var(--model); border-radius: .4rem; padding: .2rem 1.4rem 1rem; margin-top: 3rem; }
.modelled h2, .badge { color: var(--model); } .badge { font-weight: 700; letter-spacing: .03em; }
form label { display: inline-block; margin: .3rem 1.2rem .3rem 0; font-size: .87rem; }
input { font: inherit; width: 5rem; padding: .1rem .3rem; border: 1px solid var(--line); border-radius: .2rem; }
@media print {
  @page { size: A4; margin: 14mm; } nav { display: none; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .12rem .3rem; white-space: normal; }
  tr, .scroll { break-inside: avoid; } .appendix .scroll { break-inside: auto; }
  h2, h3, .note { break-after: avoid; } .modelled, .appendix { break-before: page; }
}
"""


def page(results: Mapping[str, Result], costs: Costs = EXAMPLE) -> str:
    """The HTML of results by their names, and what they would mean on a machine with these costs to begin with."""
    body, links = [], []
    for at, (name, result) in enumerate(results.items()):
        if result.get("benchmark") in KINDS:
            links.append((f"r{at}", name))
            with complete(name):
                body.append(f'<section id="r{at}">{"".join(_section(name, result))}</section>')
    others = {name: result for name, result in results.items() if result.get("benchmark") not in KINDS}
    if others:
        links.append(("others", "other measurements"))
        body.append(f'<section id="others">{_table(other_results(others))}</section>')
    modelled = [(name, result) for name, result in results.items() if name not in others and result.get("steps")]
    if modelled:
        links.append(("what-if", "what if"))
        body.append("".join(_what_if(modelled, costs)))
    body.append("".join(_appendix(results)))
    links.append(("appendix", "every prompt"))
    nav = "".join(f'<a href="#{anchor}">{html.escape(text)}</a>' for anchor, text in links)
    # "</" would end the script element, "<!--" with "<script" would hide its end
    data = json.dumps({name: result for name, result in results.items() if name not in others}).replace("<", "\\u003c")
    script = f"<script>\n{SCRIPT.read_text(encoding='utf-8')}</script>" if modelled else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>zerodraft benchmark</title>'
        f"<style>{STYLE}</style></head><body><h1>zerodraft benchmark</h1>"
        '<p class="soft">Measured figures, but for the section that says otherwise. The results are in this file as '
        f"JSON, in the element with the id <code>results</code>.</p><nav>{nav}</nav>{''.join(body)}"
        f'<script type="application/json" id="results">{data}</script>{script}</body></html>\n'
    )


def plots_of(result: Result) -> dict[str, bytes]:
    """The figures of a result, PNG by title."""
    return {"decode": decode_plots, "kernels": kernel_plots}.get(result["benchmark"], lambda _: {})(result)


def _section(name: str, result: Result) -> Iterator[str]:
    plots = plots_of(result)
    yield f"<h2>{html.escape(name)}</h2>"
    if result["benchmark"] == "decode":
        yield from _headline(result)
    for table in result_tables(result):
        yield _table(table, result.get("subject"))
        if table.title in plots:
            yield _figure(table.title, plots.pop(table.title))
    for title, image in plots.items():
        yield _figure(title, image)
    yield _table(provenance_table(result))


def _headline(result: Result) -> Iterator[str]:
    said = {
        "over transformers' plain decoding": number(result["speedup_over_hf_plain"], 2, "x"),
        f"over its best own method ({result['hf_best']})": number(result["speedup_over_hf_best"], 2, "x"),
        "over our own plain decoding": number(result["speedup_over_own_plain"], 2, "x"),
        "tokens per pass (MAT)": number(result["mat"]),
        "outputs equal": {True: "yes", False: "NO", None: "-"}[result["equal"]],
        "prompts": str(result["prompts_measured"]),
    }
    settings = result["settings"]
    chosen = "greedy" if not settings["temperature"] else f"temperature {settings['temperature']:g}"
    target, drafter, longest = (html.escape(str(settings[key])) for key in ("target", "drafter", "max_new_tokens"))
    yield (
        f"<p>{target} with drafts by {drafter}, {chosen}, up to "
        f"{longest} new tokens. The figures are those of <code>{html.escape(str(result['subject']))}</code>.</p>"
    )
    tiles = "".join(f'<div class="tile"><b>{html.escape(v)}</b>{html.escape(k)}</div>' for k, v in said.items())
    yield f'<div class="tiles">{tiles}</div>'


def _what_if(results: Sequence[tuple[str, Result]], costs: Costs) -> Iterator[str]:
    yield '<section class="modelled" id="what-if"><h2>What if the costs were others?</h2>'
    yield '<p class="badge">MODELLED, NOT MEASURED</p>'
    yield (
        "<p>How many tokens each step drafted, whether a model drafted them, and how many the target accepted was "
        "measured in the run above; the time of each step is not: it is taken from the costs below. Copied drafts cost "
        "no draft. The pass over the prompt is left out. Draft lengths and trees stay those that were chosen for the "
        "measured machine, so a decoder that adapts to the other one can do better than this.</p>"
    )
    yield from _fields(costs)
    for name, result in results:
        with complete(name):
            table = _table(what_if_table(result, costs), result["subject"])
        yield f'<div data-acceptance="{html.escape(name)}"><p>Acceptance from: {html.escape(name)}</p>{table}</div>'
    yield "</section>"


def _fields(costs: Costs) -> Iterator[str]:
    """For the costs; hidden where nothing would come of a change."""
    yield '<form id="costs" hidden><p>Milliseconds:</p>'
    for tokens, ms in sorted(costs.target_ms.items()):
        what = f"target, {tokens} token{'s' if tokens > 1 else ''}"
        yield (
            f'<label>{what} <input type="number" min="0.001" step="any" required data-tokens="{tokens}" '
            f'value="{ms:g}"></label>'
        )
    for name, ms in (("draft", costs.draft_ms), ("other", costs.other_ms)):
        yield f'<label>{name} <input type="number" min="0" step="any" required name="{name}" value="{ms:g}"></label>'
    yield "</form>"


def _appendix(results: Mapping[str, Result]) -> Iterator[str]:
    yield '<section class="appendix" id="appendix"><h2>Every prompt</h2>'
    for name, result in results.items():
        if result.get("benchmark") == "decode":
            yield f"<h3>{html.escape(name)}</h3>"
            with complete(name):
                yield from (_table(table) for table in prompt_tables(result))
    yield "</section>"


def _table(table: Table, subject: Any = None) -> str:
    texts = {at for at, name in enumerate(table.header) if name in ("what", "task", "")}

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="text"' if at in texts else "" for at in range(len(row)))
        return "".join(f"<{tag}{kind}>{html.escape(_whole(x))}</{tag}>" for kind, x in zip(kinds, row, strict=True))

    head = f"<thead><tr>{cells('th', table.header)}</tr></thead>" if any(table.header) else ""
    marked = ((' class="subject"' if row[0] == subject else "", row) for row in table.rows)
    rows = "".join(f"<tr{mark}>{cells('td', row)}</tr>" for mark, row in marked)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return f"<h3>{html.escape(table.title)}</h3>{note}{body}"


def _whole(text: str) -> str:
    """A spread breaks before its range alone."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("]\N{NO-BREAK SPACE}(", "] (") if "] (" in text else text


def _figure(title: str, image: bytes) -> str:
    data = base64.b64encode(image).decode("ascii")
    name = html.escape(title)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
