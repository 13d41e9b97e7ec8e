"""The figures of evidence; they need matplotlib (the `train` extra)."""

from pathlib import Path
from statistics import fmean

from evidence_statistics import estimate
from evidence_table import Table
from zerodraft.ztt.plot import check_matplotlib, save_figure


def draw_losses(table: Table, path: Path) -> None:
    """The validation loss of every run at its arm's best rate, with means and intervals."""
    check_matplotlib()
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 0.5 * len(table.arms()) + 1.4), dpi=140, layout="constrained")
    axes = drawn.add_subplot()
    for place, arm in enumerate(table.arms()):
        losses = [row.loss for row in table.best_rows(arm).values()]
        mean = estimate(losses)
        if mean is None:
            continue
        axes.plot(losses, [place] * len(losses), "o", markersize=4, color="0.6")
        half = mean.high - mean.mean if mean.count > 1 else 0.0
        axes.errorbar(mean.mean, place, xerr=half, fmt="D", markersize=5, capsize=3, color="#00798c")
    axes.set_yticks(range(len(table.arms())), table.arms())
    axes.invert_yaxis()
    axes.set(xlabel="validation loss (nats per token): every seed, mean, 95% interval")
    axes.grid(alpha=0.25)
    save_figure(path, drawn)


def draw_curves(table: Table, path: Path) -> None:
    """The training loss of every arm at its best rate, mean over seeds, over training FLOPs and over tokens."""
    check_matplotlib()
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.4, 3.6), dpi=140, layout="constrained")
    for axes, what in zip(drawn.subplots(1, 2, sharey=True), ("tokens", "flops"), strict=True):
        for arm in table.arms():
            rows = list(table.best_rows(arm).values())
            if not rows:
                continue
            points = list(zip(*(row.curve for row in rows), strict=False))
            unit = getattr(rows[0], what) / rows[0].steps
            losses = [fmean(loss for _, loss in stretch) for stretch in points]
            axes.plot([unit * stretch[0][0] for stretch in points], losses, linewidth=1.2, label=arm)
        axes.set(xlabel={"tokens": "tokens", "flops": "training FLOPs"}[what], ylabel="training loss")
        axes.grid(alpha=0.25)
    drawn.axes[0].legend(fontsize=8, frameon=False)
    save_figure(path, drawn)
