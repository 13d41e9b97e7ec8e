"""What `out_of_domain.py` found, and the section of the page that is written from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from evidence_plan import OfRun
from evidence_statistics import Estimate, estimate, paired
from evidence_table import Look, best_rate
from evidence_text import grid, interval

BASELINE = "vanilla"
LEAST_SHARE = 0.01
"""Of a part that the page shows."""

HEAD = """## Out of domain

The loss of every predicted token, split by what could explain that an arm is better on one text and worse on another,
in the runs with each arm's best rate. A part's difference is the arm's loss minus that of vanilla on its tokens, paired
by seed; times its share of the tokens it is what the part contributes to the difference of the whole. A temperature is
fitted on every other block, and the loss with and without it is that of the blocks between. Where the loss is far above
the entropy, the model is surer than it is right. Markup is what WikiText's makers put into the text or took apart:
`<unk>`, `@-@`, signs with a space before them; without markup, it is undone, headings and sentences with `<unk>` are
left out.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some of the predicted tokens of a text."""

    share: float
    """Of all."""
    loss: float
    """Nats per token."""
    entropy: float
    """Of the model's predictions: what the loss would be if they were right as often as they say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain(OfRun):
    """One model on one text."""

    text: str
    tokens: int
    whole: Part
    parts: dict[str, dict[str, Part]]
    """By split and name."""
    temperature: float
    """That is best on every other block."""
    loss_at_temperature: float
    """On the blocks between."""
    loss_beside_it: float
    """On the same blocks at temperature 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domains(Look):
    """What was found in the runs of a table."""

    benchmark: ClassVar[str] = "out-of-domain"
    script: ClassVar[str] = "out_of_domain.py"

    results: tuple[Domain, ...]

    def texts(self) -> list[str]:
        """The texts, in the order in which they were measured."""
        return list(dict.fromkeys(found.text for found in self.results))

    def arms(self) -> list[str]:
        """The arms, that which the others are compared with first."""
        return list(dict.fromkeys([BASELINE, *(found.arm for found in self.results)]))

    def by_seed(self, arm: str, text: str) -> dict[int, Domain]:
        """An arm's results on a text at its best rate on the first text."""
        losses = [(found.run, found.whole.loss) for found in self.results if found.text == self.texts()[0]]
        best = (arm, best_rate(losses, arm), text)
        return {found.seed: found for found in self.results if (found.arm, found.rate, found.text) == best}


def section(found: Domains) -> Iterator[str]:
    """Everything about the runs of one table."""
    yield f"### Texts of {found.table}\n"
    yield f"From `{found.provenance.get('command', '-')}`.\n"
    header = ["text", "arm", "seeds", "loss", "entropy", "temperature", "loss without and with it", "difference"]
    yield grid(
        [*header, "at each one's temperature"],
        [row for text in found.texts() for arm in found.arms() for row in whole_rows(found, text, arm)],
    )
    header = ["text", "tokens", "share", f"{BASELINE} loss", "entropy"]
    others = found.arms()[1:]
    rows = [row for text in found.texts() for row in part_rows(found, text, others)]
    yield grid([*header, *(f"{arm}: difference (contributes)" for arm in others)], rows)


def whole_rows(found: Domains, text: str, arm: str) -> Iterator[list[str]]:
    """One arm on the whole of a text, if it was measured there."""
    runs, base = found.by_seed(arm, text), found.by_seed(BASELINE, text)
    if not runs:
        return

    def mean(of: Any) -> float:
        return sum(of(run) for run in runs.values()) / len(runs)

    def over(of: Any) -> str:
        values = [{seed: of(run) for seed, run in some.items()} for some in (runs, base)]
        return "-" if arm == BASELINE else interval(paired(*values))

    yield [
        text,
        arm,
        str(len(runs)),
        f"{mean(lambda run: run.whole.loss):.4f}",
        f"{mean(lambda run: run.whole.entropy):.4f}",
        f"{mean(lambda run: run.temperature):.2f}",
        f"{mean(lambda run: run.loss_beside_it):.4f}, {mean(lambda run: run.loss_at_temperature):.4f}",
        over(lambda run: run.whole.loss),
        over(lambda run: run.loss_at_temperature),
    ]


def part_rows(found: Domains, text: str, others: list[str]) -> Iterator[list[str]]:
    """A row for each part of a text that vanilla was measured on."""
    base = found.by_seed(BASELINE, text)
    if not base:
        return
    arms = {arm: found.by_seed(arm, text) for arm in others}
    first = next(iter(base.values()))
    for split, parts in first.parts.items():
        for name, part in parts.items():
            if not LEAST_SHARE <= part.share <= 1 - LEAST_SHARE:
                continue
            cells = []
            for runs in arms.values():
                value = difference(runs, base, split, name)
                cells.append("-" if value is None else f"{interval(value)} ({value.mean * part.share:+.4f})")
            losses = estimate([run.parts[split][name].loss for run in base.values()])
            entropies = estimate([run.parts[split][name].entropy for run in base.values()])
            assert losses is not None
            assert entropies is not None
            yield [
                text,
                f"{split}: {name}",
                f"{part.share:.3f}",
                f"{losses.mean:.4f}",
                f"{entropies.mean:.4f}",
                *cells,
            ]


def difference(of: Mapping[int, Domain], over: Mapping[int, Domain], split: str, name: str) -> Estimate | None:
    """The loss of some runs on a part minus that of others, over the seeds that both have."""
    losses = [{seed: run.parts[split][name].loss for seed, run in runs.items()} for runs in (of, over)]
    return paired(*losses)
