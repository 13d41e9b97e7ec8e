"""The page of evidence: every word and figure on it comes from the tables' files, verdicts included."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from evidence_beside import Found, draw, files_beside, read_beside, sections
from evidence_claims import CLAIMS, claims
from evidence_exits import ExitTable
from evidence_figures import draw_curves, draw_losses
from evidence_statistics import Estimate, estimate, paired, phi, size_of_equal
from evidence_table import Row, Table, difference, final_losses, read_table, texts_of
from evidence_text import grid, interval
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.outputs import write_whole
from zerodraft.training.recipe import ModelRecipe

HEAD = """# Evidence

Written by `python benchmarks/evidence.py report` from `results/evidence/`; do not edit.

Losses are nats per token on text that was not trained on, after the last cycle unless it says otherwise; lower is
better. Runs of one seed read the same text in the same order, whatever the arm, so arms are compared seed by seed: a
difference is the mean over the seeds that both arms have, its brackets are the 95% t-interval over them. Each arm is
shown at its best learning rate of those tried, which was chosen on the validation loss: that flatters every arm a
little. Differences are between best rates among those that both arms have tried, so that it flatters both alike. FLOPs
are three times those counted in a forward pass.
"""

PHI = """phi: r cycles of a shared block are worth r^phi copies of it
([arXiv 2604.21106](https://arxiv.org/abs/2604.21106)). The loss is taken to be linear in the logarithm of the
parameters in layers, between `{baseline}` and `{bound}`; phi is found for every seed. 0: the cycles bring nothing, 1:
as much as stored copies.
"""

AT_EACH_RATE = """### At each rate

The same pairs, not at the best rate of each arm but at one rate for both. Many intervals stand here: of twenty, one
misses by chance.
"""

EQUAL_LOSS = """### Parameters at equal loss

Between {arms} the loss is taken to be linear in the logarithm of the parameters in layers, seed by seed.
"""


def write_report(folder: Path, page: Path) -> None:
    """Writes the page and its figures, which lie in `figures/` beside it.

    Raises:
        ZerodraftError: a table is damaged, or two have one name.
    """
    tables = read_tables(folder)
    for name, table in tables.items():
        for what, draw_table in (("losses", draw_losses), ("curves", draw_curves)):
            draw_table(table, page.parent / figure(name, what))
    beside = read_beside(folder, tables)
    draw(beside, page)
    write_whole(page, markdown(tables, beside))


def read_tables(folder: Path) -> dict[str, Table]:
    """The tables with results in a folder, by name.

    Raises:
        ZerodraftError: one is damaged, or is not called what its file is called.
    """
    tables = {path.stem: read_table(path) for path in sorted({*folder.glob("*.json")} - files_beside(folder))}
    for name, table in tables.items():
        if table.plan.table != name:
            raise ZerodraftError(
                f"The result '{folder / name}.json' is that of the table '{table.plan.table}': rename it."
            )
    return {name: table for name, table in tables.items() if table.rows}


def figure(name: str, what: str) -> str:
    """Where a figure lies, seen from the page."""
    return f"figures/evidence-{name}-{what}.png"


def markdown(tables: Mapping[str, Table], beside: Found) -> str:
    """The page."""
    parts = [HEAD, "## The claims\n", *claims(tables, beside.get(ExitTable, ()))]
    for name, table in tables.items():
        parts += section(name, table)
    return "\n".join([*parts, *sections(beside)])


# --- a table ---


def section(name: str, table: Table) -> Iterator[str]:
    """Everything about one table."""
    plan = table.plan
    yield f"## {name}\n"
    if plan.title:
        yield f"{plan.title}.\n"
    yield setting(table)
    yield "### Means\n"
    yield grid(*means(table))
    if differences := compared(table):
        yield f"### Against {plan.baseline}\n"
        yield grid(*differences)
        if plan.bound in table.arms():
            yield PHI.format(baseline=plan.baseline, bound=plan.bound)
    if rows := at_each_rate(table):
        yield AT_EACH_RATE
        yield grid(["arms", "rate", "pairs", "validation loss"], rows)
    if rows := equal_losses(table):
        yield EQUAL_LOSS.format(arms=", ".join(plain_arms(table)))
        yield grid(["arm", "seeds", "parameters in layers, in times of vanilla's at the same loss"], rows)
    yield "### Every run\n"
    yield f"From `{provenance(table)}`. Losses by cycle.\n"
    yield grid(*every_run(table))
    if table.diverged:
        yield grid(["run", "did not end"], [[f"`{found.run}`", found.why] for found in table.diverged])
    yield f"![Losses of every run]({figure(name, 'losses')})\n\n![Training loss]({figure(name, 'curves')})\n"


def setting(table: Table) -> str:
    """What all runs have in common, in a sentence."""
    recipe, first = table.rows[0].whole_recipe(), table.rows[0]
    training, seeds = recipe.training, {row.seed for row in table.rows}
    swept = f"every rate for {table.plan.sweep} of them" if table.plan.sweep else "every rate for all of them"
    return (
        f"Hidden size {recipe.model.hidden_size}, vocabulary {recipe.tokenizer.vocab_size:,}, context "
        f"{recipe.data.context_length}, batch {training.batch_size * training.accumulation}, {training.optimizer}; "
        f"{first.tokens:,} tokens in the first run, {first.tokens / first.parameters:.2g} a stored parameter. Results "
        f"of {len(table.rows)} runs with {len(seeds)} of the {len(table.plan.seeds)} planned seeds, {swept}.\n"
    )


def means(table: Table) -> tuple[list[str], list[list[str]]]:
    """Every arm at its best rate."""
    texts = texts_of(table)
    header = [
        "arm",
        "layers run",
        "zero tokens",
        "stored parameters",
        "tokens",
        "FLOPs",
        "minutes",
        "rate (tried)",
        "seeds",
    ]
    header += [f"{text} loss" for text in texts] + ["validation loss by cycle"]
    base = next(iter(table.best_rows(table.plan.baseline).values()), None)
    rows = []
    for arm in table.arms():
        runs = list(table.best_rows(arm).values())
        if not runs:
            continue
        first, model = runs[0], runs[0].model
        minutes = [row.seconds / 60 for row in runs if row.seconds is not None]
        rows.append(
            [
                arm,
                layers(model),
                "yes" if model.zero_tokens and model.kind == "ztt" else "no",
                f"{first.parameters:,}{over(first.parameters, base and base.parameters)}",
                f"{first.tokens:,}",
                f"{first.flops:.3g}{over(first.flops, base and base.flops)}",
                f"{fmean(minutes):.1f}" if minutes else "-",
                f"{first.rate} ({len(table.rates_tried(arm))})",
                str(len(runs)),
                *(interval(estimate(list(final_losses(table, arm, text).values()))) for text in texts),
                by_cycle(mean_by_cycle(runs)),
            ]
        )
    return header, rows


def compared(table: Table) -> tuple[list[str], list[list[str]]] | None:
    """The differences from the baseline, and phi; None where there is nothing to compare."""
    texts, baseline, bound = texts_of(table), table.plan.baseline, table.plan.bound
    with_phi = bound in table.arms()
    rows = []
    for arm in table.arms():
        value = difference(table, arm, baseline)
        if arm != baseline and value is not None:
            others = [interval(difference(table, arm, baseline, text)) for text in texts[1:]]
            exponent = [interval(phi_of(table, arm), digits=2)] if with_phi else []
            rows.append([arm, str(value.count), interval(value), *others, *exponent])
    header = ["arm", "pairs", *(f"{text} loss" for text in texts), *(["phi"] if with_phi else [])]
    return (header, rows) if rows else None


def at_each_rate(table: Table) -> list[list[str]]:
    """The pairs of arms that the claims compare, at every rate that both have tried; none of a table with one rate."""
    if len(table.plan.rates) < 2:
        return []
    pairs = [(arm, claim.other) for claim in CLAIMS if claim.other in table.arms() for arm in claim.arms(table)]
    rows = []
    for arm, other in pairs:
        for rate in table.plan.rates:
            found = paired(losses_at(table, arm, rate), losses_at(table, other, rate))
            if found is not None:
                rows.append([f"{arm}, {other}", rate, str(found.count), interval(found)])
    return rows


def losses_at(table: Table, arm: str, rate: str) -> dict[int, float]:
    """Validation losses by seed."""
    return {row.seed: row.loss for row in table.rows if (row.arm, row.rate) == (arm, rate)}


def plain_arms(table: Table) -> list[str]:
    """Arms that run every stored layer once, on as much text as the baseline; smallest first."""
    base = next(iter(table.best_rows(table.plan.baseline).values()), None)
    firsts = [next(iter(table.best_rows(arm).values()), None) for arm in table.arms()]
    plain = [row for row in firsts if row and base and row.model.cycles == 1 and row.tokens == base.tokens]
    return [row.arm for row in sorted(plain, key=lambda row: row.layer_parameters)]


def equal_losses(table: Table) -> list[list[str]]:
    """For every looped arm, its parameters in layers over those of a vanilla model with its loss."""
    sizes: dict[int, dict[int, float]] = {}
    for arm in plain_arms(table):
        for seed, row in table.best_rows(arm).items():
            sizes.setdefault(seed, {})[row.layer_parameters] = row.loss
    rows = []
    for arm in table.arms():
        looped = {seed: row for seed, row in table.best_rows(arm).items() if row.model.cycles > 1}
        needed = {seed: size_of_equal(row.loss, sizes.get(seed, {})) for seed, row in looped.items()}
        ratios = [row.layer_parameters / size for seed, row in looped.items() if (size := needed[seed])]
        if ratios and len(ratios) == len(looped):
            rows.append([arm, str(len(ratios)), interval(estimate(ratios), digits=2)])
    return rows


def phi_of(table: Table, arm: str) -> Estimate | None:
    """phi over the seeds that the arm, the baseline and the bound have; None of an arm without cycles or of another
    depth than the bound, and where a seed allows none."""
    plan = table.plan
    names = (arm, plan.baseline, plan.bound or "")
    looped, vanilla, unshared = (table.best_rows(name, names) for name in names)
    values = []
    for seed in looped.keys() & vanilla.keys() & unshared.keys():
        model = looped[seed].model
        if model.cycles < 2 or model.depth != unshared[seed].model.depth:
            return None
        layer = looped[seed].layer_parameters // model.num_hidden_layers
        value = phi(
            loss=looped[seed].loss, vanilla=vanilla[seed].loss, unshared=unshared[seed].loss, copies=model.cycles,
            once=layer * (model.head_layers + model.tail_layers), shared=layer * model.shared_layers,
        )  # fmt: skip
        if value is None:
            return None
        values.append(value)
    return estimate(values)


def every_run(table: Table) -> tuple[list[str], list[list[str]]]:
    """All runs, in the order of arms, rates and seeds, with what repeats them."""
    texts = texts_of(table)
    order = {arm: at for at, arm in enumerate(table.arms())}
    rows = [
        [
            row.arm,
            row.rate,
            str(row.seed),
            *(by_cycle(row.losses.get(text, ())) for text in texts),
            "-" if row.seconds is None else f"{row.tokens / row.seconds:,.0f}",
            f"`{row.provenance.get('command', '-')}`",
        ]
        for row in sorted(table.rows, key=lambda row: (order[row.arm], row.rate, row.seed))
    ]
    return ["arm", "rate", "seed", *(f"{text} loss" for text in texts), "tokens/s", "again by"], rows


def provenance(table: Table) -> str:
    """Where the runs were made: versions, machines and commits."""
    found = [row.provenance for row in table.rows]
    versions = {f"{name} {version}" for one in found for name, version in one.get("versions", {}).items()}
    machines = {f"{one.get('cpu', '-')}, {one.get('threads', '-')} threads" for one in found}
    commits = {str(one.get("commit", "-"))[:10] for one in found}
    return "; ".join(", ".join(sorted(values)) for values in (versions, machines, commits))


def layers(model: ModelRecipe) -> str:
    """Layers in the order in which they run."""
    if model.kind != "ztt" or model.cycles == 1:
        return str(model.num_hidden_layers)
    parts = [model.head_layers, f"{model.cycles} x {model.shared_layers}", model.tail_layers]
    return " + ".join(str(part) for part in parts if part)


def mean_by_cycle(rows: Sequence[Row]) -> list[float]:
    """Mean validation losses after each cycle."""
    return [fmean(losses) for losses in zip(*(row.losses["validation"] for row in rows), strict=True)]


# --- cells ---


def by_cycle(losses: Sequence[float]) -> str:
    """Losses after each cycle."""
    return ", ".join(f"{loss:.4f}" for loss in losses) or "-"


def over(value: float, base: float | None) -> str:
    """How many times the baseline's."""
    return f" ({value / base:.2f}x)" if base else ""
