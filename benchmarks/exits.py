"""Whether early exit pays: loss over FLOPs of every rule on finished runs, against the best fixed depths.

    python benchmarks/exits.py runs/evidence/exits --seeds 0

Writes `results/evidence/exit-rules-TABLE.json`, from which `python benchmarks/evidence.py report` makes a section of
the page. The data of the runs must be there (ZERODRAFT_DATA).
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from evidence_exits import Exits, ExitTable, Measured
from finished_runs import FinishedRun, look, look_arguments
from zerodraft import ZttForCausalLM
from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.compare import Interval, best_line, interval, on_line
from zerodraft.ztt.exits import exit_rule_from_dict
from zerodraft.ztt.flops import count_flops
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
    model: ZttForCausalLM, ids: Int[Tensor, "rows t"], levels: Sequence[float] = LEVELS
) -> tuple[tuple[Point, ...], dict[str, tuple[Measured, ...]]]:
    """The fixed depths, and every rule that the model has a score for.

    Args:
        model: With several cycles.
        ids: Thresholds are placed on every other row; what is returned was measured on the rows between.
        levels: Shares of the scores that thresholds are placed at.
    """
    before, between = Ruler(model, ids[::2]), Ruler(model, ids[1::2])
    line_before, fixed = best_line(depths_alone(before)), tuple(depths_alone(between))
    line, rules = best_line(fixed), {}
    for name in scored_names():
        if RULES[name].rule.reads_zero_mass and model.zero_tokens is None:
            continue
        scored, points = scored_rule(name), []
        placed = trade_off(before, scored, before.scores(scored), levels)
        # levels at which the threshold is the same are neighbours
        for rule, same in groupby(placed.items(), key=lambda at: at[1].rule):
            assert rule is not None
            point = between.measure(exit_rule_from_dict(rule))
            above = above_line(between, point, line)
            for level, point_before in same:
                above_before = above_line(before, point_before, line_before).mean
                points.append(Measured(level=level, point=point, above=above, above_before=above_before))
        rules[name] = tuple(points)
    return fixed, rules


def measure_run(finished: FinishedRun, blocks: int) -> Exits:
    """One run on its validation text.

    Raises:
        ZerodraftError: it has none.
    """
    text = finished.data(finished.tokenizer()).validation
    if text is None:
        raise ZerodraftError(f"{finished.run} held no text back to validate on")
    fixed, rules = measure_rules(finished.model(), text.rows(blocks))
    return Exits(**finished.run._asdict(), fixed=fixed, rules=rules)


def measure(runs: list[FinishedRun], options: Namespace) -> Iterator[Exits]:
    """All runs with several cycles that are asked for.

    Raises:
        ZerodraftError: there is none.
    """
    asked = [run for run in runs if not options.seeds or run.run.seed in options.seeds]
    looped = [run for run in asked if run.recipe.model.cycles > 1]
    if not looped:
        named = "', '".join(map(str, options.table))
        raise ZerodraftError(f"no finished run in '{named}' that was asked for has more than one cycle")
    for run in looped:
        yield measure_run(run, options.blocks)


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    parser = look_arguments(__doc__, blocks=200)
    parser.add_argument("--seeds", type=int, nargs="+", help="only runs with these seeds")
    return look(ExitTable, measure, parser, words)


if __name__ == "__main__":
    sys.exit(main())
