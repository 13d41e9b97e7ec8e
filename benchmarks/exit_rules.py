"""Whether early exit pays: loss over FLOPs of every rule on finished runs, against the best fixed depths.

    python benchmarks/exit_rules.py runs/evidence/exits --seeds 0

Writes `results/evidence/exit-rules-TABLE.json`, from which `python benchmarks/evidence.py report` makes a section of
the page. The data of the runs must be there (ZERODRAFT_DATA).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from evidence_exits import Exits, ExitTable, Measured, best_line, on_line, result_file
from finished_runs import FinishedRun, finished_runs, rows_of
from zerodraft import FixedExit, ZttForCausalLM
from zerodraft.bench.measure import provenance, write_result
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.strict import to_mapping
from zerodraft.ztt.compare import Interval, interval
from zerodraft.ztt.exits import SCORED
from zerodraft.ztt.flops import count_flops
from zerodraft.ztt.tradeoff import LEVELS, Point, Ruler, at_level, scored_rule

ROOT = Path(__file__).parent.parent


def above_line(ruler: Ruler, point: Point, line: Sequence[Point]) -> Interval:
    """The loss of a measured point over that of the line through fixed depths at the same FLOPs, block by block."""
    left, right, share = on_line(line, point.flops)
    return interval(ruler.losses(point) - (1 - share) * ruler.losses(left) - share * ruler.losses(right))


def fixed_depths(ruler: Ruler) -> list[Point]:
    """The same depth for all tokens, 1 to all cycles, at what a model with so many cycles costs."""
    model, row, points = ruler.model, ruler.blocks[:1], []
    for cycles in range(1, model.config.cycles + 1):
        with count_flops() as counted, torch.no_grad():
            model(row, use_cache=False, cycles=cycles)
        cost = counted.total / row.numel()
        point = ruler.measure(FixedExit(cycles=cycles))
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
    line_before, fixed = best_line(fixed_depths(before)), tuple(fixed_depths(between))
    line, rules = best_line(fixed), {}
    for name in SCORED:
        if name == "zero-mass" and model.zero_tokens is None:
            continue
        scores, points = before.scores(scored_rule(name)), []
        for level in levels:
            rule = at_level(scored_rule(name), scores, level)
            point = between.measure(rule)
            points.append(
                Measured(
                    level=level,
                    point=point,
                    above=above_line(between, point, line),
                    above_before=above_line(before, before.measure(rule), line_before).mean,
                )
            )
        rules[name] = tuple(points)
    return fixed, rules


def measure(finished: FinishedRun, blocks: int) -> Exits:
    """One run on its validation text.

    Raises:
        ZerodraftError: it has none.
    """
    text = finished.data().validation
    if text is None:
        raise ZerodraftError(f"{finished.run} held no text back to validate on")
    fixed, rules = measure_rules(finished.model(), rows_of(text, blocks))
    return Exits(**finished.run._asdict(), fixed=fixed, rules=rules)


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="RUNS/TABLE", help="folder with the runs of a table")
    parser.add_argument("--blocks", type=int, default=200, help="of the text, taken evenly; 0: all (default 200)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only runs with these seeds")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "evidence", help="folder for the result")
    options = parser.parse_args(words)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        runs = [run for run in finished_runs(options.table) if not options.seeds or run.run.seed in options.seeds]
        looped = [run for run in runs if run.recipe.model.cycles > 1]
        if not looped:
            raise ZerodraftError(f"no finished run in '{options.table}' that was asked for has more than one cycle")
        found = tuple(measure(run, options.blocks) for run in looped)
    except ZerodraftError as error:
        print(error, file=sys.stderr)
        return 2
    command = ["python", "benchmarks/exit_rules.py", f"runs/evidence/{options.table.name}", "--blocks", options.blocks]
    command += ["--seeds", *options.seeds] if options.seeds else []
    made = provenance(seed=0, words=[str(word) for word in command])
    result = ExitTable(table=options.table.name, results=found, provenance=made)
    write_result(options.results / result_file(result.table), to_mapping(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
