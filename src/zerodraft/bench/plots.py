"""The figures of reports as PNG; needs matplotlib (the `train` extra)."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import nan
from typing import Any

from zerodraft.bench.methods import BASE, FULL, OWN_PLAIN, PARTS, SELF, writes_the_same
from zerodraft.bench.summary import speedup_interval
from zerodraft.bench.tables import task_name
from zerodraft.ztt.plot import check_matplotlib, png_of
from zerodraft.ztt.rules import RULES

Result = Mapping[str, Any]
PALETTE = (
    "#9a9a9a", "#edae49", "#d1495b", "#5b5f97", "#66a182", "#00798c", "#2e4057",
    "#a26769", "#8cb369", "#c17767", "#b8b8ff", "#7a5195", "#4f772d", "#ffb5a7",
)  # fmt: skip
NAMES = (BASE, "hf_lookup", "block_tree", OWN_PLAIN, "lookup", FULL, "block_path", "hf_assisted", "hf_dflash", *PARTS)
FEW = 30
"""Drafts at a position; with fewer its acceptance is not shown."""
PHASES = {"prefill": "#c9c9c9", "draft": "#edae49", "search": "#d1495b", "verify": "#00798c", "other": "#5b5f97"}


def decode_plots(result: Result) -> dict[str, bytes]:
    """PNG by title, of a result of `bench decode`."""
    drawn: dict[str, Callable[[Result, Any], None]] = {}
    if any("speedup" in values for values in result["overall"].values()):
        drawn["Speedup by task"] = _speedup_by_task
        if any(name in result["overall"] for name in PARTS):
            drawn["What each part brings"] = _parts
    drawn["MAT by task"] = _mat
    if any(counts["tried_at"] for counts in result["acceptance"].values()):
        drawn["Acceptance by position"] = _acceptance
    if result["phases"]:
        drawn["Where the time goes"] = _phases
    if result.get("exits"):
        known = [name for name in ("loss", "agreement") if any(v[name] is not None for v in result["exits"].values())]
        for name in known[:1]:
            drawn[f"Speed over {name}"] = partial(_exits, x=name, y="tokens_per_second")
        drawn["Time of a token over its depth"] = partial(_exits, x="cycles_per_token", y="ms_per_token")
    if result.get("batches"):
        drawn["Batches over depth"] = _batches
    return {title: _png(draw, result) for title, draw in drawn.items()}


def kernel_plots(result: Result) -> dict[str, bytes]:
    """PNG by title, of a result of `bench kernels`: a section each."""
    plots = {}
    for section in result["sections"].values():
        values = {point["at"][section["x"]] for point in section["points"]}
        if not all(isinstance(value, (int, float)) for value in values):
            plots[section["title"]] = _png(_stacked, section)
        elif len(values) > 1:
            plots[section["title"]] = _png(_lines, section)
    return plots


def _png(draw: Callable[[Any, Any], None], measured: Any) -> bytes:
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # names out of a file may hold dollar signs
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(8.4, 3.8), dpi=140, layout="constrained")
        axes = figure.add_subplot()
        draw(measured, axes)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return png_of(figure)


def _bars(axes: Any, groups: list[str], bars: Mapping[str, Sequence[float]], errors: Mapping[str, Any]) -> None:
    width = 0.8 / len(bars)
    for at, (name, heights) in enumerate(bars.items()):
        places = [group + (at - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(
            places, heights, width, label=name, color=_colour(name), yerr=errors.get(name),
            error_kw={"elinewidth": 0.7, "alpha": 0.6},
        )  # fmt: skip
    axes.set_xticks(
        range(len(groups)), [textwrap.fill(group, 13, break_long_words=False) for group in groups], fontsize=8
    )
    axes.legend(fontsize=7, frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))


def _colour(name: str) -> str:
    """A method has the same one in all figures."""
    if name.startswith(SELF):
        # those of methods that a looped model has no use for
        return [PALETTE[at] for at in (2, 6, 7, 8)][int(name.removeprefix(SELF)) % 4]
    return PALETTE[NAMES.index(name) if name in NAMES else len(name) % len(PALETTE)]


def _speedup_by_task(result: Result, axes: Any) -> None:
    """Without the variations that lack a part: they have a figure of their own."""
    groups = {"all": result["overall"], **result["by_task"]}
    prompts = {task: [row for row in result["prompts"] if task in ("all", row["task"])] for task in groups}
    names = [name for name in result["overall"] if name not in (BASE, *PARTS) and _is_compared(result, name)]
    bars = {name: [methods[name]["speedup"] for methods in groups.values()] for name in names}
    errors = {name: _errors(bars[name], [speedup_interval(rows, name) for rows in prompts.values()]) for name in names}
    _bars(axes, list(map(task_name, groups)), bars, errors)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set(ylabel="times plain decoding\n(95% interval over prompts)")


def _is_compared(result: Result, name: str) -> bool:
    """Exits have figures of their own."""
    return name not in result.get("exits", {}) or writes_the_same(name)


def _errors(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Lengths of whiskers; an interval need not hold the value that it belongs to."""
    low = [max(value - interval[0], 0) for value, interval in zip(values, intervals, strict=True)]
    high = [max(interval[1] - value, 0) for value, interval in zip(values, intervals, strict=True)]
    return [low, high]


def _parts(result: Result, axes: Any) -> None:
    overall = result["overall"]
    names = [name for name in (OWN_PLAIN, *PARTS, FULL) if name in overall]
    values = [overall[name]["speedup"] for name in names]
    whiskers = _errors(values, [speedup_interval(result["prompts"], name) for name in names])
    colours = [_colour(name if name == FULL else BASE) for name in names]
    axes.barh(names, values, color=colours, xerr=whiskers, error_kw={"elinewidth": 0.7, "alpha": 0.6})
    for at, value in enumerate(values):
        axes.annotate(f"{value:.2f}x", (0, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set(xlabel="times plain decoding (95% interval over prompts)")


def _mat(result: Result, axes: Any) -> None:
    groups = {"all": result["overall"], **result["by_task"]}
    names = [name for name in result["overall"] if result["overall"][name]["mat"] is not None]
    names = [name for name in names if name not in (BASE, OWN_PLAIN, "no_lean") and _is_compared(result, name)]
    bars = {name: [methods[name]["mat"] or 0 for methods in groups.values()] for name in names}
    if bars:
        _bars(axes, list(map(task_name, groups)), bars, {})
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set(ylabel="tokens per pass of the target")


EXIT_AXES = {
    "loss": "loss per token (nats)",
    "agreement": "share of the tokens of full depth, each after the same text",
    "cycles_per_token": "cycles per token",
    "tokens_per_second": "tokens per second",
    "ms_per_token": "milliseconds per token",
}


def _exits(result: Result, axes: Any, *, x: str, y: str) -> None:
    """Every method with exits, and those of full depth; fixed depths are joined."""
    found = {name: values for name, values in result["exits"].items() if values[x] is not None}
    fixed = {name.partition(":")[2]: values for name, values in found.items() if name.startswith("cycles:")}
    if OWN_PLAIN in found:
        fixed |= {"all": found[OWN_PLAIN]}
    style = {"color": "0.45", "linestyle": "--", "linewidth": 1, "marker": "s", "markersize": 4}
    axes.plot([v[x] for v in fixed.values()], [v[y] for v in fixed.values()], label="same cycles for all", **style)
    for cycles, values in fixed.items():
        axes.annotate(cycles, (values[x], values[y]), (4, 4), textcoords="offset points", fontsize=8)
    for name, values in found.items():
        if name == OWN_PLAIN or name.startswith("cycles:"):
            continue
        rule = name.partition(":")[0]
        if name == "calibrated":
            style = {"marker": "*", "markersize": 11, "color": "black"}
        elif rule in RULES:
            style = {"marker": "o", "markersize": 6, "color": RULES[rule].colour}
        else:
            style = {"marker": "^" if name.startswith(SELF) else "D", "markersize": 6, "color": _colour(name)}
        axes.plot(values[x], values[y], label=name, linestyle="none", **style)
    axes.set(xlabel=EXIT_AXES[x], ylabel=EXIT_AXES[y], ylim=(0, 1.1 * max(values[y] for values in found.values())))
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _batches(result: Result, axes: Any) -> None:
    """Tokens per second by the number of requests at once, and what the bound makes of full depth."""
    sizes = result["batches"]["sizes"]
    rows = [size["rows"] for size in sizes]
    for at, (name, marker) in enumerate(zip(sizes[0]["tokens_per_second"], "os^", strict=True)):
        spreads, colour = [size["tokens_per_second"][name] for size in sizes], PALETTE[(5, 2, 1)[at]]
        axes.plot(rows, [s["median"] for s in spreads], marker=marker, markersize=4, color=colour, label=name)
        axes.fill_between(rows, [s["min"] for s in spreads], [s["max"] for s in spreads], color=colour, alpha=0.15)
        if at == 0:
            bound = [s["median"] * size["bound"] for s, size in zip(spreads, sizes, strict=True)]
            axes.plot(rows, bound, "--", color="0.5", linewidth=1, label="bound, 1 / (1 - s + s d) of full depth")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, list(map(str, rows)))
    axes.minorticks_off()
    axes.set(xlabel="requests at once", ylabel="tokens per second", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)


def _acceptance(result: Result, axes: Any) -> None:
    """Without shares of too few drafts to say anything."""
    for name, counts in result["acceptance"].items():
        tried = counts["tried_at"]
        shares = [a / t if t >= FEW else nan for a, t in zip(counts["accepted_at"], tried, strict=True)]
        if tried:
            places = range(1, len(tried) + 1)
            axes.plot(places, shares, marker="o", markersize=3, color=_colour(name), label=name)
    axes.set(xlabel=f"drafted position (at least {FEW} drafts)", ylabel="share accepted up to here", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)


def _phases(result: Result, axes: Any) -> None:
    names = list(result["phases"])
    tokens = [result["overall"][name]["tokens"] for name in names]
    left = [0.0] * len(names)
    for phase, colour in PHASES.items():
        widths = [1e3 * result["phases"][name][phase] / n for name, n in zip(names, tokens, strict=True)]
        axes.barh(names, widths, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds per new token")
    axes.legend(fontsize=8, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))


def _stacked(section: Mapping[str, Any], axes: Any) -> None:
    """The parts of a whole, a bar for each value; `step` is the whole."""
    points = section["points"]
    names = [str(point["at"][section["x"]]) for point in points]
    left = [0.0] * len(names)
    for at, part in enumerate(part for part in points[0]["milliseconds"] if part != "step"):
        widths = [point["milliseconds"][part]["median"] for point in points]
        axes.barh(names, widths, left=left, color=PALETTE[at + 1], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds per step")
    axes.legend(fontsize=8, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))


def _lines(section: Mapping[str, Any], axes: Any) -> None:
    x, points = section["x"], section["points"]
    varied = [name for name in points[0]["at"] if name != x and len({point["at"][name] for point in points}) > 1]
    series: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for point in points:
        others = [f"{name} {point['at'][name]}" for name in varied]
        for name, spread in point["milliseconds"].items():
            series.setdefault(", ".join([name, *others]), []).append((point["at"][x], spread))
    for at, (name, line) in enumerate(series.items()):
        line = sorted(line, key=lambda pair: pair[0])
        places, spreads = [place for place, _ in line], [spread for _, spread in line]
        colour = PALETTE[(at + 1) % len(PALETTE)]
        axes.plot(places, [s["median"] for s in spreads], marker="o", markersize=3, color=colour, label=name)
        axes.fill_between(places, [s["q1"] for s in spreads], [s["q3"] for s in spreads], color=colour, alpha=0.15)
    ticks = sorted({point["at"][x] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    medians = [spread["median"] for line in series.values() for _, spread in line]
    if max(medians) > 20 * min(medians):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=section["x_label"], ylabel="milliseconds")
    axes.legend(fontsize=7, frameon=False)
