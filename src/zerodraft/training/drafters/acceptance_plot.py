"""Draws how a drafter's blocks are accepted: by position, by rank, and how sure it is; needs matplotlib."""

import os

import numpy as np

from zerodraft.training.drafters.acceptance import Acceptance
from zerodraft.ztt.plot import check_matplotlib, save_figure

INK, SECOND = "#00798c", "#d1495b"


def plot_acceptance(path: str | os.PathLike[str], acceptance: Acceptance, title: str = "") -> None:
    """Write a PNG of three panels.

    Args:
        path: Where to.
        acceptance: What was measured.
        title: Above the panels.

    Raises:
        ZerodraftError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), dpi=150, layout="constrained")
    position, rank, confidence = figure.subplots(1, 3)
    k, r = acceptance.ranks.shape
    slots = np.arange(1, k + 1)
    position.bar(slots, acceptance.by_position, color=INK)
    position.set(xlabel="drafted position", ylabel="share of steps", title="accepted up to here", ylim=(0, 1))
    covered = acceptance.ranks[:, : r - 1].cumsum(1)
    for width in (1, 2, 4, 8):
        if width <= covered.shape[1]:
            rank.plot(slots, covered[:, width - 1], marker="o", markersize=3, label=f"top {width}")
    rank.set(xlabel="position in the block", title="right token among the choices", ylim=(0, 1))
    rank.legend(fontsize=8, frameon=False)
    seen = acceptance.bin_counts > 0
    confidence.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    confidence.plot(acceptance.confidence[seen], acceptance.correct[seen], color=SECOND, marker="o", markersize=4)
    confidence.set(xlabel="probability of the first choice", ylabel="share right", title="calibration")
    confidence.set(xlim=(0, 1), ylim=(0, 1))
    for axes in (position, rank, confidence):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    save_figure(path, figure)
