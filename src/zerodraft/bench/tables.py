"""The figures of results as tables of text, for every form of report."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from zerodraft.bench.whatif import Costs, break_even, modelled_speedup
from zerodraft.common.errors import ZerodraftError, why

Result = Mapping[str, Any]
KINDS = ("decode", "memory", "kernels")
"""What a result of these commands says that it is."""

TASKS = {
    "mt_bench": "conversation (MT-Bench)",
    "qa": "question answering",
    "rag": "retrieval-augmented",
    "math_reasoning": "mathematics",
    "summarization": "summarisation",
    "translation": "translation",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A title, what to know about it, and cells; the first column names the rows."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@contextmanager
def complete(name: str) -> Iterator[None]:
    """Around what reads a result: one that lacks something, or has it in another form, becomes one sentence.

    Raises:
        ZerodraftError: the result is not as `zerodraft bench` writes them.
    """
    try:
        yield
    except ZerodraftError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ZerodraftError(
            f"The result '{name}' is not as 'zerodraft bench' writes it: {why(error)}; measure it again."
        ) from error


def other_results(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """What other commands measured, and how."""
    rows = []
    for name, result in results.items():
        told = result.get("provenance", result)
        told = told if isinstance(told, Mapping) else {}
        rows.append((name, str(told.get("command", "-")), str(told.get("commit") or "-")[:10]))
    return Table("Other measurements", "", ("file", "command", "commit"), rows)


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def share(value: float | None) -> str:
    """A share in percent, or a dash where there is none."""
    return number(None if value is None else 100 * value, 1, "%")


def spread_of(spread: Mapping[str, float] | None, digits: int = 2) -> str:
    """Median, quartiles and range."""
    if not spread:
        return "-"
    low, high, least, most = (number(spread[key], digits) for key in ("q1", "q3", "min", "max"))
    return f"{number(spread['median'], digits)} [{low}, {high}] ({least} to {most})"


def task_name(task: str) -> str:
    """What people call it."""
    return TASKS.get(task, task)


def decode_tables(result: Result) -> list[Table]:
    """Of `bench decode`: overall, by task, acceptance, time, differences."""
    overall = Table(
        "All prompts",
        "Speed: all tokens over all seconds. Speedups are over transformers' plain decoding in the same run. By "
        "prompt: median [quartiles] (range). MAT: new tokens per pass of the target. Equal: prompts with exactly the "
        "tokens of plain decoding; near ties: of the others, those whose first difference rounding explains.",
        (
            "method",
            "what",
            "tokens/s",
            "speedup",
            "speedup by prompt",
            "tokens/s by prompt",
            "MAT",
            "equal",
            "near ties",
            "new tokens",
        ),
        [
            (
                name,
                result["methods"].get(name, ""),
                number(values.get("tokens_per_second"), 1),
                number(values.get("speedup"), 2, "x"),
                spread_of(values.get("speedup_by_prompt")),
                spread_of(values.get("tokens_per_second_by_prompt"), 1),
                number(values["mat"]),
                f"{values['equal']}/{values['prompts']}" if "equal" in values else "-",
                str(values.get("near_ties", "-")),
                str(values["tokens"]),
            )
            for name, values in result["overall"].items()
        ],
    )
    tables = [overall]
    speeds = {
        "Speedup by task": (
            "All tokens over all seconds of the task, over plain decoding.",
            lambda v: number(v.get("speedup"), 2, "x"),
        ),
        "Speedup by prompt, by task": (
            "Median [quartiles] (range) over the prompts.",
            lambda v: spread_of(v.get("speedup_by_prompt")),
        ),
        "Tokens per second by task": (
            "Median [quartiles] (range) over the prompts.",
            lambda v: spread_of(v.get("tokens_per_second_by_prompt"), 1),
        ),
    }
    others = {
        "MAT by task": ("New tokens per pass of the target.", lambda v: number(v["mat"])),
        "Equal tokens by task": (
            "Prompts with the tokens of plain decoding.",
            lambda v: f"{v['equal']}/{v['prompts']}" if "equal" in v else "-",
        ),
    }
    timed = any("speedup" in values for values in result["overall"].values())
    for title, (note, cell) in ((speeds if timed else {}) | others).items():
        rows = [(name, *(cell(methods[name]) for methods in result["by_task"].values())) for name in result["overall"]]
        tables.append(Table(title, note, ("method", *map(task_name, result["by_task"])), rows))
    return [*tables, *looped_tables(result), *_inside(result), *_differences(result)]


def _inside(result: Result) -> Iterator[Table]:
    """What our decoders did: acceptance by position, seconds by phase."""
    drafted = {name: counts for name, counts in result["acceptance"].items() if counts["tried_at"]}
    if drafted:
        columns = [
            [f"{a / t:.3f} ({a}/{t})" if t else "-" for a, t in zip(c["accepted_at"], c["tried_at"], strict=True)]
            for c in drafted.values()
        ]
        rows = [(str(at), *cells) for at, cells in enumerate(zip_longest(*columns, fillvalue=""), 1)]
        yield Table(
            "Acceptance by position",
            "Of the drafts that reach so far, the share that was accepted so far.",
            ("position", *drafted),
            rows,
        )
    if result["phases"]:
        phases = list(next(iter(result["phases"].values())))
        rows = [
            (name, *(f"{s[p]:.2f} ({100 * s[p] / s['total']:.1f}%)" for p in phases))
            for name, s in result["phases"].items()
        ]
        yield Table(
            "Where the time goes",
            "Seconds over all prompts. Verify holds the target's pass; prefill is the pass over the prompt.",
            ("method", *phases),
            rows,
        )


def looped_tables(result: Result) -> Iterator[Table]:
    """Of a looped model: what leaving early saves and costs, alone and in batches over depth."""
    if result.get("exits"):
        yield Table(
            "Early exit",
            "Milliseconds of a token behind the prompt's. Agreement: of the tokens of full depth, those that are "
            "chosen with exits too, each after the same text. Loss (nats per token) and FLOPs: on the text of --text.",
            ("method", "cycles per token", "ms per token", "tokens/s", "agreement", "loss", "FLOPs"),
            [
                (
                    name,
                    number(values["cycles_per_token"]),
                    number(values["ms_per_token"], 3),
                    number(values["tokens_per_second"], 1),
                    share(values["agreement"]),
                    number(values["loss"], 4),
                    share(values["flops"]),
                )
                for name, values in result["exits"].items()
            ],
        )
    if result.get("batches"):
        told = result["batches"]
        names = list(told["sizes"][0]["tokens_per_second"])
        rows = []
        for size in told["sizes"]:
            rates = size["tokens_per_second"]
            full, over, waiting = (rates[name]["median"] for name in names)
            rows.append(
                (
                    str(size["rows"]),
                    *(spread_of(rates[name], 1) for name in names),
                    *(number(value, 2, "x") for value in (over / full, size["bound"], over / waiting)),
                    number(size["mean_cycles"]),
                    share(size["occupancy"]),
                    f"{size['equal']}/{size['requests']}",
                )
            )
        yield Table(
            "Batches over depth",
            f"Tokens per second by the number of requests at once, with exits by {told['rule']}. In step: batches of "
            "neighbours in which all wait for the deepest token and the longest text. The bound is 1 / (1 - s + s d), "
            f"s = {told['share_of_cycles']:.3f} being the share of the cycles in the FLOPs and d the mean share of the "
            "cycles that are run. Equal: answers over depth that are those in step.",
            ("requests", *names, "over / full depth", "bound", "over / in step", "cycles", "occupancy", "equal"),
            rows,
        )


def _differences(result: Result) -> Iterator[Table]:
    if result["differences"]:
        yield Table(
            "Differing tokens",
            "The first difference of each text, how far apart the two best logits of plain decoding lay there, and how "
            "far that of the token that was written lay below the best.",
            ("prompt", "method", "token", "logits apart", "below the best", "near tie"),
            [
                (
                    d["id"],
                    d["method"],
                    str(d["place"] + 1),
                    *("-" if d[key] is None else f"{d[key]:.1e}" for key in ("top_gap", "deficit")),
                    "yes" if d["near_tie"] else "no",
                )
                for d in result["differences"]
            ],
        )


def prompt_tables(result: Result) -> list[Table]:
    """Every prompt's own figures."""
    names = list(result["overall"])
    cells = {
        "seconds": ("Seconds by prompt", lambda v: number(v, 3)),
        "mat": ("MAT by prompt", number),
        "count": ("New tokens by prompt", lambda v: "-" if v is None else str(v)),
    }
    return [
        Table(
            title,
            "",
            ("prompt", "task", "prompt tokens", *names),
            [
                (row["id"], row["task"], str(row["prompt_tokens"]), *(cell(row[key][name]) for name in names))
                for row in result["prompts"]
            ],
        )
        for key, (title, cell) in cells.items()
    ]


def kernel_tables(result: Result) -> list[Table]:
    """Of `bench kernels`: one for each section."""
    tables = []
    for section in result["sections"].values():
        points = section["points"]
        settings = list(points[0]["at"])
        timed = list(dict.fromkeys(name for point in points for name in point["milliseconds"]))
        extras = list(dict.fromkeys(name for point in points for name in point.get("figures", {})))
        rows = [
            (
                *(str(point["at"][name]) for name in settings),
                *(spread_of(point["milliseconds"].get(name), 3) for name in timed),
                *(f"{point['figures'][name]:.3g}" if name in point.get("figures", {}) else "-" for name in extras),
            )
            for point in points
        ]
        header = (*settings, *(f"{name} (ms)" for name in timed), *extras)
        tables.append(Table(section["title"], section["about"], header, rows))
    return tables


def memory_tables(result: Result) -> list[Table]:
    """Of `bench memory`."""
    rows = []
    for name, values in result["memory"].items():
        mib = (number(values["mib"][key], 0) for key in ("loaded", "load_peak", "decode_peak", "after", "peak"))
        ratios = (number(values[key], 2, "x") for key in ("ratio", "decode_ratio"))
        rows.append((name, *mib, *ratios, f"{values['prompt_tokens']} + {values['new_tokens']}"))
    note = (
        "Resident MiB of a process for each method: loaded, while loading, while decoding, after it, and the peak of "
        "all. Each has loaded target and drafter; the ratios are to plain decoding, of the peak and of the peak while "
        "decoding. Tokens: of the prompt and new."
    )
    header = ("method", "loaded", "loading", "decoding", "after", "peak", "ratio", "decoding ratio", "tokens")
    return [Table("Memory", note, header, rows)]


def result_tables(result: Result) -> list[Table]:
    """All figures of a result of any kind."""
    return {"decode": decode_tables, "memory": memory_tables, "kernels": kernel_tables}[result["benchmark"]](result)


def provenance_table(result: Result) -> Table:
    """How to measure it again, and where it was measured."""
    said = {**result.get("settings", {}), **result["provenance"]}
    rows = [(name.replace("_", " "), _plain(value)) for name, value in said.items()]
    return Table("How it was measured", "", ("", ""), rows)


def what_if_table(result: Result, costs: Costs) -> Table:
    """Modelled speedups by task, from measured acceptance and stated costs."""
    tasks = list(result["by_task"])
    rows = []
    for name, by_task in result["steps"].items():
        every = [step for steps in by_task.values() for step in steps]
        rows.append(
            (
                name,
                number(modelled_speedup(every, costs), 2, "x"),
                *(number(modelled_speedup(by_task[task], costs), 2, "x") for task in tasks),
                number(break_even(every, costs), 1),
            )
        )
    return Table(
        "Modelled speedup over plain decoding",
        f"If a step cost: {costs}. The last column: what a draft may cost before it stops paying.",
        ("method", "all prompts", *map(task_name, tasks), "break-even draft (ms)"),
        rows,
    )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
