"""Draws the trade-off between compute and loss; needs matplotlib (the `train` extra)."""

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.outputs import write_whole
from zerodraft.ztt.rules import RULES
from zerodraft.ztt.tradeoff import Point


def check_matplotlib() -> None:
    """Raise `ZerodraftError` unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ZerodraftError("Plots need matplotlib; install it with pip install 'zerodraft[train]'.")


def plot_trade_off(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[Point]],
    *,
    fixed: Sequence[Point] = (),
    chosen: Point | None = None,
    title: str = "",
) -> None:
    """Write a PNG: loss over the share of FLOPs, a line for each rule.

    Args:
        path: Where to.
        curves: Measurements by name of the rule.
        fixed: The same number of cycles for all tokens, 1 to N: what a rule has to beat.
        chosen: Is ringed.
        title: Above the plot.

    Raises:
        ZerodraftError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if fixed:
        line = {"color": "0.45", "linestyle": "--", "linewidth": 1, "marker": "s", "markersize": 4}
        axes.plot([p.flops for p in fixed], [p.loss for p in fixed], label="same depth for all tokens", **line)
        for cycles, point in enumerate(fixed, 1):
            axes.annotate(f"{cycles}", (point.flops, point.loss), (4, 4), textcoords="offset points", fontsize=8)
    for name, points in curves.items():
        ordered = sorted(points, key=lambda point: point.flops)
        # another form of a rule is called `RULE, FORM`
        rule, _, form = name.partition(",")
        colour = RULES[rule].colour if rule in RULES else None
        style = {"color": colour, "marker": "^" if form else "o", "markersize": 3, "linewidth": 1.3}
        style["linestyle"] = ":" if form else "-"
        axes.plot([p.flops for p in ordered], [p.loss for p in ordered], label=name, **style)
    if chosen is not None:
        axes.plot(chosen.flops, chosen.loss, "o", markersize=11, markerfacecolor="none", color="black", label="chosen")
    axes.set(xlabel="FLOPs per token, share of the model without exits", ylabel="loss per token (nats)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    save_figure(path, figure)


def save_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Write a matplotlib figure as PNG, beside its place first."""
    write_whole(Path(path), png_of(figure))


def png_of(figure: Any) -> bytes:
    """A matplotlib figure as PNG with a palette: lines and words need few colours, and it has a third of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = io.BytesIO()
    drawn.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(image, "PNG", optimize=True)
    return image.getvalue()
