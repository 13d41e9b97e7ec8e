"""Whether early exit pays: loss over FLOPs of every rule on finished runs, against the best fixed depths.

    python benchmarks/exits.py runs/evidence/exits --seeds 0
    python benchmarks/exits.py models/ztt-million-exits --text examples/held-out/standard-ebooks.txt

Writes `results/evidence/exit-rules-TABLE.json`, from which `python benchmarks/evidence.py report` makes a section of
the page. The data of the runs must be there (ZERODRAFT_DATA). With --text it is any folder with a model, read on that
text, which must not be one that it was trained on.

Every rule is measured with one threshold for all cycles and with one for each. Beside them stands what no rule can
pass: every token at its best depth, for one who knows its losses, and for one who knows the distribution that the last
cycle predicts instead of the token that comes.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evidence_exits import Ceiling, Exits, ExitTable, Measured
from evidence_plan import Run
from finished_runs import FinishedRun, finished_runs, look, look_arguments
from zerodraft import ZttForCausalLM
from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import load_pretrained
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.data import PackedBlocks, pack_texts, read_documents
from zerodraft.training.recipe import DataRecipe
from zerodraft.ztt.calibrate import halves
from zerodraft.ztt.compare import Interval, best_line, interval, on_line
from zerodraft.ztt.exits import ExitPolicy, exit_rule_from_dict
from zerodraft.ztt.flops import count_flops
from zerodraft.ztt.placing import Placing
from zerodraft.ztt.rules import RULES, scored_names
from zerodraft.ztt.tradeoff import LEVELS, Point, Ruler, fixed_depths, scored_rule, trade_off


def above_line(ruler: Ruler, point: Point, line: Sequence[Point]) -> Interval:
    """The loss of a measured point over that of the line through fixed depths at the same FLOPs, block by block."""
    left, right, share = on_line(line, point.flops)
    return interval(ruler.losses(point) - (1 - share) * ruler.losses(left) - share * ruler.losses(right))


def depths_alone(ruler: Ruler) -> list[Point]:
    """The same depth for all tokens, 1 to all cycles, at what a model with so many cycles costs."""
    model, row, points = ruler.model, ruler.blocks[:1], []
    for cycles, point in enumerate(fixed_depths(ruler), 1):
        with count_flops() as counted, torch.no_grad():
            model(row, use_cache=False, cycles=cycles)
        cost = counted.total / row.numel()
        points.append(replace(point, flops_per_token=cost, flops=cost / ruler.full.flops_per_token))
    return points


def measure_rules(
    model: ZttForCausalLM,
    ids: Int[Tensor, "rows t"],
    levels: Sequence[float] = LEVELS,
    policy: ExitPolicy = "propagate",
    names: Sequence[str] = scored_names(),
) -> tuple[tuple[Point, ...], dict[str, tuple[Measured, ...]], dict[str, tuple[Ceiling, ...]]]:
    """The fixed depths, every rule that the model has a score for in both forms, and what no rule can pass.

    Args:
        model: With several cycles.
        ids: Thresholds are placed on every other row; what is returned was measured on the rows between.
        levels: Shares of the scores that thresholds for all cycles are placed at.
        policy: What deeper cycles see of exited tokens.
        names: Of the rules.
    """
    before, between = (Ruler(model, half, policy) for half in halves(ids))
    line_before, fixed = best_line(depths_alone(before)), tuple(depths_alone(between))
    exiting, line, rules, placing = fixed_depths(before), best_line(fixed), {}, None
    for name in names:
        if RULES[name].rule.reads_zero_mass and model.zero_tokens is None:
            continue
        placing = Placing(before, scored_rule(name), exiting)
        forms = {
            name: (placing.for_all, levels),
            f"{name}, each cycle": (placing.for_each, placing.prices(len(levels))),
        }
        for form, (place, at) in forms.items():
            points = []
            placed = trade_off(before, place, at)
            # levels at which the threshold is the same are neighbours
            for rule, same in groupby(placed.items(), key=lambda at: at[1].rule):
                assert rule is not None
                point = between.measure(exit_rule_from_dict(rule))
                above = above_line(between, point, line)
                for value, point_before in same:
                    above_before = above_line(before, point_before, line_before).mean
                    where = {"level" if form == name else "price": value}
                    points.append(Measured(**where, point=point, above=above, above_before=above_before))
            rules[form] = tuple(points)
    assert placing is not None
    return fixed, rules, ceilings(between, fixed_depths(between), line, placing.prices(len(levels)))


def ceilings(
    ruler: Ruler, fixed: Sequence[Point], line: Sequence[Point], prices: Sequence[float]
) -> dict[str, tuple[Ceiling, ...]]:
    """Loss and FLOPs with every token at its best depth, by price of compute, for two who know more than a rule.

    They pay for the keys and values that exits leave behind, and not for knowing. Losses are those of tokens whose
    company has the same depth.
    """
    outcomes = ruler.outcomes(scored_rule("latent"), fixed)
    found = {}
    for who, known in {"losses": None, "last prediction": expected_losses(ruler)}.items():
        points = []
        for price in prices:
            loss, flops = outcomes.oracle(price, known)
            left, right, share = on_line(line, flops)
            above = loss - (1 - share) * left.loss - share * right.loss
            points.append(Ceiling(price=price, flops=flops, loss=loss, above=above))
        found[who] = tuple(points)
    return found


@torch.no_grad()
def expected_losses(ruler: Ruler) -> Float[Tensor, "n cycles"]:
    """The loss of each token after each cycle as the last cycle's distribution expects it (their cross entropy)."""
    found, cycles = [], ruler.model.config.cycles
    for batch in ruler.blocks.split(ruler.batch_size):
        each = [
            ruler.model(batch, use_cache=False, cycles=n).logits[:, :-1].flatten(0, 1) for n in range(1, cycles + 1)
        ]
        last = each[-1].softmax(-1)
        found.append(torch.stack([-(last * logits.log_softmax(-1)).sum(-1) for logits in each], 1).double())
    return torch.cat(found)


def validation_text(finished: FinishedRun) -> PackedBlocks:
    """What a run was validated on.

    Raises:
        ZerodraftError: nothing.
    """
    text = finished.data(finished.tokenizer()).validation
    if text is None:
        raise ZerodraftError(f"{finished.run} held no text back to validate on")
    return text


def given_text(folder: Path, text: Sequence[str], longest: int) -> PackedBlocks:
    """A text in tokens of the model in a folder.

    Raises:
        ZerodraftError: it is too short.
    """
    length = min(256, longest)
    packed = pack_texts(read_documents(text, DataRecipe()), load_tokenizer(folder), length)
    if len(packed) < 2:
        raise ZerodraftError(f"the text has fewer than two blocks of {length} tokens: give a longer one")
    return packed


def measure(runs: list[FinishedRun], options: Namespace) -> Iterator[Exits]:
    """All runs with several cycles that are asked for, or the models in folders; with every policy.

    Raises:
        ZerodraftError: there is none.
    """
    looked_at: list[tuple[Run, ZttForCausalLM, PackedBlocks]] = []
    if options.text:
        for folder in options.table:
            model = load_pretrained(ZttForCausalLM, folder, dtype=torch.float32).eval()
            assert isinstance(model, ZttForCausalLM)
            text = given_text(folder, options.text, model.config.max_position_embeddings)
            looked_at.append((Run(folder.name, "model", 0), model, text))
    for run in runs:
        if run.recipe.model.cycles > 1 and (not options.seeds or run.run.seed in options.seeds):
            looked_at.append((run.run, run.model(), validation_text(run)))
    if not looked_at:
        named = "', '".join(map(str, options.table))
        raise ZerodraftError(f"no finished run in '{named}' that was asked for has more than one cycle")
    for run, model, text in looked_at:
        for policy in options.policy:
            fixed, rules, known = measure_rules(model, text.rows(options.blocks), policy=policy, names=options.rules)
            arm = run.arm if policy == "propagate" else f"{run.arm}-{policy}"
            yield Exits(arm=arm, rate=run.rate, seed=run.seed, fixed=fixed, rules=rules, ceilings=known)


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    parser = look_arguments(__doc__, blocks=200)
    parser.add_argument("--seeds", type=int, nargs="+", help="only runs with these seeds")
    parser.add_argument("--text", nargs="+", help="the folders are models; read them on this text")
    policies, names = get_args(ExitPolicy), scored_names()
    parser.add_argument("--policy", nargs="+", choices=policies, default=["propagate"], help="for exited tokens")
    parser.add_argument("--rules", nargs="+", choices=names, default=names, help="only these")
    return look(ExitTable, measure, parser, words, lambda given: [] if given.text else finished_runs(given.table))


if __name__ == "__main__":
    sys.exit(main())
