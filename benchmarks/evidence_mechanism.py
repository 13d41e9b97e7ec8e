"""What `mechanism.py` found, and the section of the page that is written from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from evidence_plan import OfRun
from evidence_table import Look, best_rate
from evidence_text import grid
from zerodraft.ztt.plot import check_matplotlib, save_figure

FIRST_QUERY = 16
"""Masses are means over the positions from here on: earlier ones have few tokens to attend to."""

HEAD = f"""## Mechanism

What the cycles do and where attention goes, on held-out text, in the runs with each arm's best rate; means over seeds.
Masses are means over the positions from {FIRST_QUERY} on. In a cycle a state moves by |after - before| / |after|; the
cosine is that of the two. A loss without something is that of weights which were trained with it: it says what they
came to need, not how well a model can learn without.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism(OfRun):
    """What was found in one model on one text."""

    text: str
    tokens: int
    executions: tuple[str, ...]
    """`layer.cycle` of each execution of a layer, both counted from 1."""
    first_mass: tuple[tuple[float, ...], ...]
    """Attention mass on the first token of the block, by execution and head."""
    even_mass: float
    """What the first token would have if attention were the same for all tokens."""
    zero_mass: tuple[tuple[float, ...], ...]
    """Attention mass on the zero token, by execution and head; 0 where there is none."""
    losses: tuple[float, ...]
    """With 1, 2, ... cycles, each time followed by the tail."""
    moved: tuple[float, ...]
    """|after - before| / |after| of the states, by cycle."""
    turned: tuple[float, ...]
    """Cosine of the states before and after, by cycle."""
    without: dict[str, float]
    """The loss of the same weights when something is taken from them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanisms(Look):
    """What was found in the runs of a table."""

    benchmark: ClassVar[str] = "mechanism"
    script: ClassVar[str] = "mechanism.py"

    results: tuple[Mechanism, ...]

    def texts(self) -> list[str]:
        """The texts, in the order in which they were measured."""
        return list(dict.fromkeys(found.text for found in self.results))

    def by_arm(self, text: str) -> dict[str, list[Mechanism]]:
        """The results on a text by arm, each at its best rate on the first text."""
        losses = [(found.run, found.losses[-1]) for found in self.results if found.text == self.texts()[0]]
        best = {arm: best_rate(losses, arm) for arm in {found.arm for found in self.results}}
        chosen: dict[str, list[Mechanism]] = {}
        for found in self.results:
            if found.text == text and found.rate == best[found.arm]:
                chosen.setdefault(found.arm, []).append(found)
        return chosen


def section(found: Mechanisms) -> Iterator[str]:
    """Everything about the runs of one table."""
    first = found.results[0]
    yield f"### Runs of {found.table}\n"
    yield f"From `{found.provenance.get('command', '-')}`, {first.tokens:,} tokens of each text.\n"
    taken = list(dict.fromkeys(name for one in found.results for name in one.without))
    header = ["text", "arm", "seeds", "loss by cycles run", *(f"loss, {name}" for name in taken)]
    rows = [cycle_row(text, arm, seeds, taken) for text in found.texts() for arm, seeds in found.by_arm(text).items()]
    yield grid([*header, "moved by cycle", "cosine by cycle"], rows)
    text = found.texts()[0]
    even = f"even attention gives the first token {first.even_mass:.3f}"
    yield f"Attention on the {text} text, a value for each head; {even}.\n"
    header = ["arm", "layer.cycle", "mass on the zero token", "mass on the first token"]
    yield grid(header, [row for arm, seeds in found.by_arm(text).items() for row in mass_rows(arm, seeds)])
    yield f"![Attention masses]({figure(found.table)})\n"


def cycle_row(text: str, arm: str, seeds: Sequence[Mechanism], taken: Sequence[str]) -> list[str]:
    """What the cycles of an arm bring, means over its seeds."""
    without = [[one.without[name] for one in seeds if name in one.without] for name in taken]
    return [
        text,
        arm,
        str(len(seeds)),
        numbers(means([one.losses for one in seeds]), 4),
        *(f"{fmean(losses):.4f}" if losses else "-" for losses in without),
        numbers(means([one.moved for one in seeds]), 3),
        numbers(means([one.turned for one in seeds]), 3),
    ]


def masses(seeds: Sequence[Mechanism], token: str) -> list[list[float]]:
    """The mass on the `zero` or the `first` token by execution and head, means over seeds."""
    return [means(rows) for rows in zip(*(getattr(one, f"{token}_mass") for one in seeds), strict=True)]


def mass_rows(arm: str, seeds: Sequence[Mechanism]) -> Iterator[list[str]]:
    """Where the attention of each execution of a layer goes."""
    rows = zip(seeds[0].executions, masses(seeds, "zero"), masses(seeds, "first"), strict=True)
    for execution, zero, first in rows:
        yield [arm, execution, numbers(zero, 3) if any(zero) else "-", numbers(first, 3)]


def draw_masses(found: Mechanisms, page: Path) -> None:
    """The masses on the zero token and on the first token by execution, beside the page: mean over heads and seeds, and
    each head."""
    check_matplotlib()
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.4, 3.6), dpi=140, layout="constrained")
    arms = found.by_arm(found.texts()[0])
    for axes, token in zip(drawn.subplots(1, 2), ("zero", "first"), strict=True):
        for colour, (arm, seeds) in enumerate(arms.items()):
            # only executions with a zero token have mass on one
            shown = [(at, heads) for at, heads in enumerate(masses(seeds, token), 1) if any(heads)]
            places, heads = [at for at, _ in shown], [heads for _, heads in shown]
            if shown:
                axes.plot(places, [fmean(values) for values in heads], color=f"C{colour}", label=arm)
                axes.plot(places, heads, ".", markersize=4, alpha=0.5, color=f"C{colour}")
        axes.set(xlabel="execution of a layer", ylabel=f"attention mass on the {token} token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    drawn.axes[1].legend(fontsize=8, frameon=False)
    save_figure(page.parent / figure(found.table), drawn)


def figure(table: str) -> str:
    """Where the figure lies, seen from the page."""
    return f"figures/evidence-{Mechanisms.benchmark}-{table}.png"


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each column."""
    return [fmean(column) for column in zip(*rows, strict=True)]


def numbers(values: Sequence[float], digits: int) -> str:
    """Several of them in a cell."""
    return ", ".join(f"{value:.{digits}f}" for value in values)
