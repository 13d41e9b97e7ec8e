"""Reports: every measured figure is in them, what is modelled is kept apart, the documentation is up to date."""

import base64
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zerodraft.bench import plots
from zerodraft.bench.files import read_results, write_plots
from zerodraft.bench.page import markdown
from zerodraft.bench.summary import figures, headline, speedup_interval
from zerodraft.bench.tables import decode_tables
from zerodraft.bench.whatif import SCRIPT, Costs, break_even, modelled_speedup, parse_costs
from zerodraft.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def record(seconds: float, count: int, steps: list[list[int]], **more: Any) -> dict[str, Any]:
    phases = {"prefill": 0.1, "draft": 0.2, "search": 0.01, "verify": seconds - 0.35, "other": 0.04, "total": seconds}
    return {
        "count": count,
        "seconds": seconds,
        "equal": True,
        "steps": steps,
        "phases": phases,
        "tried_at": [len(steps)] * 4,
        "accepted_at": [sum(accepted > at for _, accepted, _ in steps) for at in range(4)],
        **more,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """Four prompts of two tasks; `full` needs half of the passes, a fourth prompt differs by a near tie."""
    steps = [[4, 3, 1], [4, 0, 1], [0, 0, 0], [4, 2, 0], [4, 0, 1]]
    rows = []
    for at, task in enumerate(("qa", "rag", "qa", "rag")):
        close = {"near_tie": True, "top_gap": 4.2e-4, "deficit": 4.2e-4}
        differs = {"equal": False, "first_difference": 6, **close} if at == 3 else {}
        methods = {
            "hf_plain": {"count": 11, "seconds": 1.0 + at / 8, "equal": True, "passes": 10},
            "hf_lookup": {"count": 11, "seconds": 0.9 + at / 7, "equal": True, "passes": 8},
            "plain": record(0.8 + at / 9, 11, [[0, 0, 0]] * 10),
            "full": record(0.45 + at / 11, 11, steps, **differs),
            "no_tree": record(0.6 + at / 13, 11, [[3, 1, 1]] * 5),
        }
        rows.append({"id": f"q{at}", "task": task, "prompt_tokens": 20 + at, "methods": methods})
    names = list(rows[0]["methods"])
    settings = {"target": "tiny", "drafter": "small", "temperature": 0.0, "max_new_tokens": 11}
    return {
        "benchmark": "decode",
        **headline(rows, names),
        "settings": settings,
        "methods": {name: f"about {name}" for name in names},
        **figures(rows, names),
        "provenance": {"versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "command": "zerodraft bench <x>"},
    }


@pytest.fixture
def kernels() -> dict[str, Any]:
    spread = {"median": 1.234, "q1": 1.1, "q3": 1.5, "min": 0.9, "max": 7.25}
    point = {"milliseconds": {"lean": spread}, "figures": {"transformers / lean": 1.87}}
    points = [{"at": {"tokens": tokens, "context": 128}, **point} for tokens in (1, 8)]
    section = {"title": "A pass", "about": "By tokens.", "x": "tokens", "x_label": "tokens", "points": points}
    return {"benchmark": "kernels", "settings": {}, "sections": {"target": section}, "provenance": {"commit": None}}


class Page(HTMLParser):
    """Text of cells, sources of images, everything that would be loaded, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self._tag, self._id = "", None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._tag, self._id = tag, given.get("id")
        if tag == "img":
            self.images.append(given["src"] or "")
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th", "b"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._tag in ("td", "th", "b"):
            self.cells[-1] += data.replace("\N{NO-BREAK SPACE}", " ")
        elif self._tag == "script" and self._id == "results":
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def report(folder: Path, out: str, results: dict[str, Any], *words: str) -> str:
    files = []
    for name, result in results.items():
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(result), encoding="utf-8")
    assert main(["bench", "report", *map(str, files), "--out", str(folder / out), *words]) == 0
    return (folder / out).read_text(encoding="utf-8")


def shown(result: dict[str, Any]) -> set[str]:
    """What has to be in the report: every figure, as it is written there."""
    expected = set()
    for methods in (result["overall"], *result["by_task"].values()):
        for values in methods.values():
            expected |= {f"{values['speedup']:.2f}x", f"{values['equal']}/{values['prompts']}", f"{values['mat']:.2f}"}
            for spread, digits in ((values["tokens_per_second_by_prompt"], 1), (values["speedup_by_prompt"], 2)):
                expected |= {f"{spread[key]:.{digits}f}" for key in ("median", "q1", "q3", "min", "max")}
    for counts in result["acceptance"].values():
        expected |= {f"({a}/{t})" for a, t in zip(counts["accepted_at"], counts["tried_at"], strict=True)}
    for seconds in result["phases"].values():
        expected |= {f"{value:.2f}" for value in seconds.values()}
    for prompt in result["prompts"]:
        expected |= {f"{value:.3f}" for value in prompt["seconds"].values()}
        expected |= {prompt["id"], str(prompt["prompt_tokens"])}
    for difference in result["differences"]:
        expected |= {str(difference["place"] + 1), f"{difference['top_gap']:.1e}"}
    return expected | {f"{result[key]:.2f}x" for key in result if key.startswith("speedup_over")}


def test_the_summary_is_that_of_the_rows(result: dict[str, Any]) -> None:
    full = result["overall"]["full"]
    assert full["mat"] == 40 / 20
    assert result["overall"]["hf_lookup"]["mat"] == 10 / 8
    seconds = {name: sum(row["seconds"][name] for row in result["prompts"]) for name in result["overall"]}
    assert full["speedup"] == pytest.approx(seconds["hf_plain"] / seconds["full"])
    assert result["speedup_over_own_plain"] == pytest.approx(seconds["plain"] / seconds["full"])
    assert result["hf_best"] == min(("hf_plain", "hf_lookup"), key=lambda name: seconds[name])
    assert result["by_task"]["rag"]["full"]["equal"] == 1
    assert (full["near_ties"], result["equal"], result["identical"]) == (1, True, False)
    assert result["steps"]["full"]["qa"] == [[0, 0, 2, 0], [4, 0, 4, 1], [4, 2, 2, 0], [4, 3, 2, 1]]
    assert result["acceptance"]["full"] == {"tried_at": [20] * 4, "accepted_at": [8, 8, 4, 0]}


def test_the_page_has_every_figure_and_needs_nothing_else(
    result: dict[str, Any], kernels: dict[str, Any], tmp_path: Path
) -> None:
    text = report(tmp_path, "report.html", {"decode": result, "kernels": kernels}, "--plots", str(tmp_path / "plots"))
    page = Page(text)
    cells = " ".join(page.cells)
    missing = {figure for figure in shown(result) if figure not in cells}
    assert not missing
    assert "1.234 [1.100, 1.500] (0.900 to 7.250)" in page.cells
    assert "zerodraft bench <x>" in page.cells  # escaped and read back
    assert json.loads(page.data) == {"decode": result, "kernels": kernels}
    assert len(page.images) == 6
    for image in page.images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,"), validate=True)[:4] == b"\x89PNG"
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "http" not in re.sub(r"[A-Za-z0-9+/]{200,}=*", "", text)
    assert "@media print" in text
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "decode-acceptance-by-position.png",
        "decode-mat-by-task.png",
        "decode-speedup-by-task.png",
        "decode-what-each-part-brings.png",
        "decode-where-the-time-goes.png",
        "kernels-a-pass.png",
    ]


def test_a_result_without_times_is_reported_too(result: dict[str, Any], tmp_path: Path) -> None:
    for methods in (result["overall"], *result["by_task"].values()):
        for values in methods.values():
            for key in ("tokens_per_second", "tokens_per_second_by_prompt", "speedup", "speedup_by_prompt"):
                del values[key]
    result |= {key: None for key in result if key.startswith("speedup")} | {"phases": {}}
    assert "3/4" in Page(report(tmp_path, "report.html", {"equality": result})).cells
    assert "near ties aside" in report(tmp_path, "page.md", {"equality": result})


def test_what_is_modelled_is_marked_and_apart(result: dict[str, Any], kernels: dict[str, Any], tmp_path: Path) -> None:
    plain = report(tmp_path, "report.html", {"decode": result})
    text = report(tmp_path, "report.html", {"decode": result}, "--what-if", "target_ms=1:20/5:25,draft_ms=5")
    apart = re.search(r'<section class="modelled".*?</section>', text, re.DOTALL)
    assert apart is not None
    assert "MODELLED, NOT MEASURED" in apart.group()
    # five steps of a prompt: three of 25 + 5 ms, one of a copy, 25 ms, one of 20 ms; 10 tokens of 20 ms each
    assert f"{200 / 135:.2f}x" in Page(apart.group()).cells
    assert "modelled" not in text.replace(apart.group(), "").partition("<script")[0].partition("<body")[2].lower()
    assert text.replace(apart.group(), "") == re.sub(
        r'<section class="modelled".*?</section>', "", plain, flags=re.DOTALL
    )
    # the costs to begin with are those that the fields show
    assert re.findall(r' value="([0-9.]+)"', apart.group()) == ["20", "25", "5", "0"]
    assert "what-if" not in report(tmp_path, "report.html", {"kernels": kernels})


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_the_page_has_the_same_sums() -> None:
    rng = random.Random(0)
    cases = []
    for n in range(20):
        steps = [
            [rng.randrange(30), rng.randrange(9), rng.randrange(1, 50), rng.randrange(2)][: 4 if n % 2 else 3]
            for _ in range(rng.randrange(6))
        ]
        target = {k: rng.uniform(1, 50) for k in rng.sample(range(1, 40), rng.randrange(1, 4))}
        cases.append((steps, Costs(target, rng.uniform(0, 9), rng.uniform(0, 3))))
    given = [
        [steps, {"points": sorted(costs.target_ms.items()), "draft": costs.draft_ms, "other": costs.other_ms}]
        for steps, costs in cases
    ]
    program = f"{SCRIPT.read_text(encoding='utf-8')}\nconst cases = {json.dumps(given)};"
    program += "console.log(JSON.stringify(cases.map(([steps, costs]) => modelled(steps, costs))))"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True, timeout=60)
    for (steps, costs), found in zip(cases, json.loads(done.stdout), strict=True):
        for value, expected in (
            (found["speedup"], modelled_speedup(steps, costs)),
            (found["breakEven"], break_even(steps, costs)),
        ):
            assert value == (expected if expected is None else pytest.approx(expected))


def test_acceptance_by_position_runs_down_the_page(result: dict[str, Any]) -> None:
    result["acceptance"]["full"] = {"tried_at": [40] * 20 + [3] * 5, "accepted_at": [20] * 20 + [1] * 5}
    table = next(table for table in decode_tables(result) if table.title == "Acceptance by position")
    assert table.header == ("position", "plain", "full", "no_tree")
    assert [row[0] for row in table.rows] == [str(n) for n in range(1, 26)]
    assert table.rows[0][2:] == ("0.500 (20/40)", "1.000 (20/20)")
    assert table.rows[24][2:] == ("0.333 (1/3)", "")


def test_acceptance_of_few_drafts_is_not_drawn(result: dict[str, Any]) -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
    counts = {"tried_at": [40, 30, 29, 3], "accepted_at": [20, 10, 9, 3]}
    plots._acceptance({"acceptance": {"full": counts}}, axes)
    (line,) = axes.get_lines()
    assert line.get_ydata()[:2] == pytest.approx([0.5, 1 / 3])
    assert all(map(math.isnan, line.get_ydata()[2:]))


def test_whiskers_are_those_of_their_bars(result: dict[str, Any]) -> None:
    """Of the pooled ratio, which a few long prompts may put outside the quartiles over prompts."""
    prompts = [
        {"count": {"full": 10, "hf_plain": 10}, "seconds": {"full": 1.0 + at / 100, "hf_plain": 2.0 + at / 40}}
        for at in range(9)
    ]
    prompts.append({"count": {"full": 1000, "hf_plain": 1000}, "seconds": {"full": 25.0, "hf_plain": 100.0}})
    pooled = sum(p["seconds"]["hf_plain"] for p in prompts) / sum(p["seconds"]["full"] for p in prompts)
    assert pooled > 3
    low, high = speedup_interval(prompts, "full")
    assert 2 < low < pooled < high < 4
    assert speedup_interval(prompts, "full") == (low, high)
    assert speedup_interval(prompts[:1], "full") == pytest.approx((2.0, 2.0))
    for name in ("plain", "full"):
        low, high = speedup_interval(result["prompts"], name)
        assert low <= result["overall"][name]["speedup"] <= high


def test_modelled_speedup_by_hand() -> None:
    costs = parse_costs("target_ms=1:20/5:28,draft_ms=3,other_ms=1")
    assert costs == Costs({1: 20.0, 5: 28.0}, 3.0, 1.0)
    assert [costs.target(k) for k in (1, 3, 5, 9)] == [20, 24, 28, 28]
    steps = [[4, 3, 10, 1], [2, 0, 5, 1], [0, 0, 1, 0]]
    assert modelled_speedup(steps, costs) == pytest.approx(46 * 20 / (10 * 32 + 5 * 28 + 20))
    assert modelled_speedup([step[:3] for step in steps], costs) == modelled_speedup(steps, costs)
    copies = [[4, 3, 10, 1], [2, 0, 5, 0], [0, 0, 1, 0]]
    assert modelled_speedup(copies, costs) == pytest.approx(46 * 20 / (10 * 32 + 5 * 25 + 20))
    assert modelled_speedup([], costs) is None
    free = break_even(steps, costs)
    assert modelled_speedup(steps, Costs(costs.target_ms, free, 1.0)) == pytest.approx(1.0)
    assert parse_costs("target_ms=30,draft_ms=4").target(64) == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "--out", "a.html"], "RESULTS.json... is missing"),
        (["report", "x.json"], "--out is missing"),
        (["report", "x.json", "--out", "a.txt"], "--out is 'a.txt'; name a file that ends in .html or .md"),
        (["report", "no.json", "--out", "a.html"], "The result 'no.json' cannot be read"),
        (["report", "x.json", "--out", "a.html", "--what-if", "target=3"], "it must look like target_ms="),
        (["report", "x.json", "--out", "a.html", "--what-if", "target_ms=0,draft_ms=1"], "more than 0 ms"),
        (["decode", "x.json"], "unexpected word 'x.json'"),
        (["memory", "x.json"], "unexpected word 'x.json'"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "early_exit"}', encoding="utf-8")
    assert main(["bench", "report", str(other), "--out", str(tmp_path / "a.html")]) == 2
    assert "is not a result of 'zerodraft bench decode'" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


HOSTILE = "</script><script>alert(1)</script><!--<script>$x_{$ `b` | <img src=x onerror=alert(1)>"


def hostile(value: Any) -> Any:
    """Every text in a result replaced by one that breaks out where it is not escaped; names of fields stay."""
    if isinstance(value, dict):
        return {key: item if key == "benchmark" else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("out", ["a.html", "a.md"])
def test_nothing_of_a_file_gets_out_of_its_place(
    result: dict[str, Any], kernels: dict[str, Any], out: str, tmp_path: Path
) -> None:
    renamed = json.loads(json.dumps(result).replace('"no_tree"', '"<b>$a_{$"'))
    told = {"versions": {"<i>": "1"}, "commit": HOSTILE, "command": HOSTILE}
    settings = hostile(renamed["settings"]) | {"temperature": 0.0}
    bad = {**renamed, "subject": "<b>$a_{$", "settings": settings, "provenance": told}
    parts = {**hostile(kernels), "sections": kernels["sections"]}
    other = {"benchmark": "early_exit", "command": HOSTILE}
    text = report(tmp_path, out, {"<img src=x>": bad, "parts": parts, "o<p>": other})
    inside = re.sub(r"(?<!`)`[^`]*`", "", text) if out.endswith("md") else text
    for tag in ("<script>alert", "<img src=x", "<b>$", "<i>", "<!--", "<p>|"):
        assert tag not in inside
    if out.endswith("html"):
        assert HOSTILE in Page(text).cells
        assert json.loads(Page(text).data)["<img src=x>"]["provenance"] == told


@pytest.mark.parametrize("out", ["a.html", "a.md"])
def test_a_result_that_lacks_something_is_one_sentence(
    result: dict[str, Any], kernels: dict[str, Any], out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    refused = 0
    for whole in (result, kernels):
        for key in whole.keys() - {"benchmark"}:
            for change in ({}, {key: "text"}):
                file.write_text(json.dumps({k: v for k, v in whole.items() if k != key} | change), encoding="utf-8")
                code = main(["bench", "report", str(file), "--out", str(tmp_path / out)])
                said = capsys.readouterr().err
                assert code in (0, 2)
                assert (code == 2) == ("The result 'r' is not as 'zerodraft bench' writes it: " in said)
                refused += code == 2
    assert refused > 10


def test_what_other_commands_measured_is_listed(result: dict[str, Any], tmp_path: Path) -> None:
    other = {
        "benchmark": "early_exit",
        "provenance": {"command": "zerodraft calibrate x", "commit": "0123456789abcdef"},
    }
    for out in ("a.html", "a.md"):
        text = report(tmp_path, out, {"decode": result, "exits": other})
        assert "zerodraft calibrate x" in text.replace("\N{NO-BREAK SPACE}", " ")
        assert "0123456789" in text


def test_results_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("decode", "decode-parts", "a"):
        (tmp_path / f"{name}.json").write_text('{"benchmark": "memory"}')
    files = sorted(map(str, tmp_path.glob("*.json")))
    assert files[1].endswith("decode-parts.json")
    assert list(read_results(files)) == ["a", "decode", "decode-parts"]


def test_the_documentation_is_that_of_the_committed_results(tmp_path: Path) -> None:
    results = read_results(sorted(map(str, (ROOT / "results").glob("*.json"))))
    drawn = write_plots(results, tmp_path)
    links = {name: {title: f"figures/{file.name}" for title, file in files.items()} for name, files in drawn.items()}
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == markdown(results, links)
    assert all((ROOT / "docs" / link).is_file() for files in links.values() for link in files.values())
