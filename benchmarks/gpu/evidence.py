"""Tables of evidence on one GPU within minutes: runs of an arm are trained as one, arms are compiled side by side.

    ZERODRAFT_DATA=DIR python benchmarks/gpu/evidence.py recipes/evidence/million.yaml --minutes 8 --out OUT

Every arm is a process of its own. Some (`--at-once`) read and compile at the same time; they train in turn, so that
seconds can be compared. Arms that are not compiled (`--eager`) wait for Python more than for the card, and runs that
begin with an existing model are trained one by one: such arms take no turns and no seconds are kept of them. Tables
are written after every arm, and models named by `--keep` are packed beside them, into archives of 15 MB. What a run
that is cut off has finished stays.
"""

import argparse
import itertools
import logging
import math
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from evidence_plan import Plan, read_data, read_plan
from evidence_runs import make_runs
from evidence_table import joined, read_table, save_result
from harness import quiet_transformers
from zerodraft.cli.main import log_to_stderr
from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.training.folder import RESULTS
from zerodraft.training.recipe import merge

ON_GPU = {"bf16": True, "compile": True, "save_every": 0}
REHEARSAL = {"steps": 4, "warmup_steps": 1, "save_every": 2, "use_cpu": True}
"""What of `training` is other than in the plan, and what in a rehearsal."""

LARGEST_ARCHIVE = 15 << 20
"""Bytes."""


def main(words: Sequence[str] | None = None) -> int:
    """Makes the runs; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN.yaml")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop at a checkpoint after this time")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu-evidence/out"), help="folder for the tables and archives"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu-evidence"), help="folder for the runs")
    parser.add_argument("--together", type=int, default=16, metavar="N", help="train up to N runs of an arm as one")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="arms that are prepared at the same time")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME",
        help="only these: ARM, ARM/RATE or ARM/RATE/SEED, behind TABLE: where several plans have the arm",
    )  # fmt: skip
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="TABLE/ARM/SEED", help="models that are packed, at the arm's best rate"
    )
    parser.add_argument("--steps", type=int, help="make this many steps instead: for a trial of the speed")
    parser.add_argument("--eager", action="store_true", help="compile nothing: many layers take minutes to compile")
    parser.add_argument("--untimed", action="store_true", help="keep no seconds: other work is on the card")
    parser.add_argument("--rehearse", action="store_true", help="four steps on the CPU, to see that all parts run")
    options = parser.parse_args(words)
    deadline = time.monotonic() + 60 * options.minutes
    log_to_stderr(logging.INFO)
    quiet_transformers()
    try:
        read = {str(path): read_plan(path) for path in options.plans}
        check_asked(read.values(), options)
        paths = [path for path, plan in read.items() if chosen_arms(plan, options)]
        plans = [changed(read[path], options) for path in paths]
        for plan in plans:
            read_data(plan)  # tokenizer and tokens, before all arms ask for them at once
    except ZerodraftError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    turn = context.Lock()
    waiting: list[tuple[Plan, BaseProcess]] = [
        (plan, context.Process(target=make_arm, args=(plan, path, arm, options, deadline, turn), name=arm))
        for plan, path in zip(plans, paths, strict=True)
        for arm in plan.arms
    ]
    running: list[tuple[Plan, BaseProcess]] = []
    failed: list[str] = []
    packed: set[str] = set()
    while waiting or running:
        while waiting and len(running) < options.at_once:
            waiting[0][1].start()
            running.append(waiting.pop(0))
        time.sleep(0.2)
        for plan, process in [each for each in running if each[1].exitcode is not None]:
            running.remove((plan, process))
            failed += [process.name] if process.exitcode else []
            gather(plan, options, packed)
    for plan in plans:
        print_speeds(plan, options)
    for name in failed:
        print(f"{name} failed: see above", file=sys.stderr)
    return 1 if failed else 0


def changed(plan: Plan, options: argparse.Namespace) -> Plan:
    """The plan as it is run here: how the device computes, and what the options leave of it."""
    training: dict[str, Any] = dict(REHEARSAL if options.rehearse else ON_GPU)
    if options.eager:
        training["compile"] = False
    if options.steps:
        training["steps"] = options.steps
    chosen = {arm: merge(plan.arms[arm], {"training": training}) for arm in chosen_arms(plan, options)}
    baseline = plan.baseline if plan.baseline in chosen else next(iter(chosen))
    bound = plan.bound if plan.bound in chosen else None
    # as one, all rates of all seeds cost hardly more than some of them
    return replace(plan, arms=chosen, baseline=baseline, bound=bound, sweep=0)


def chosen_arms(plan: Plan, options: argparse.Namespace) -> list[str]:
    """The arms that are asked for: all without `--only`."""
    return [arm for arm in plan.arms if not options.only or asked(plan, arm, options)]


def asked(plan: Plan, arm: str, options: argparse.Namespace) -> str | None:
    """The name in `--only` that means an arm of a plan or runs of it, without the table's."""
    return next((name.rpartition(":")[2] for name in options.only if means(name, plan, arm)), None)


def means(name: str, plan: Plan, arm: str) -> bool:
    """Whether a name, perhaps behind its table's, is that of an arm or of runs of it."""
    table, _, run = name.rpartition(":")
    return table in ("", plan.table) and run.split("/")[0] == arm


def check_asked(plans: Collection[Plan], options: argparse.Namespace) -> None:
    """Raise `ZerodraftError` where a name in `--only` means nothing, or two mean the same arm."""
    arms = [(plan, arm) for plan in plans for arm in plan.arms]
    for name in options.only:
        if not any(means(name, plan, arm) for plan, arm in arms):
            raise ZerodraftError(f"--only '{name}' names no arm{did_you_mean(name, {arm for _, arm in arms})}")
    for plan, arm in arms:
        if (count := sum(means(name, plan, arm) for name in options.only)) > 1:
            raise ZerodraftError(f"--only names '{arm}' of '{plan.table}' {count} times: name it once")


def make_arm(plan: Plan, path: str, arm: str, options: argparse.Namespace, deadline: float, turn: Any) -> None:
    """One arm, in a process of its own."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = os.cpu_count() or 1
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // options.at_once)))
    began = time.monotonic()
    words = ["python", "benchmarks/gpu/evidence.py", path, *["--eager"] * options.eager]
    words += ["--steps", str(options.steps)] if options.steps else []
    first = next(run for run in plan.runs() if run.arm == arm)
    in_turn = not options.eager and plan.recipe_of(first, options.runs).model.start is None
    try:
        make_runs(
            plan,
            part(plan, arm, options),
            options.runs / arm,
            words=words,
            only=asked(plan, arm, options) or arm,
            minutes=(deadline - began) / 60,
            together=options.together,
            turn=turn if in_turn else None,
            timed=in_turn and not options.untimed,
            tell=lambda text: print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True),
        )
    except ZerodraftError as error:
        print(f"{arm}: {error}", file=sys.stderr)
        sys.exit(2)


def print_speeds(plan: Plan, options: argparse.Namespace) -> None:
    """How long a step took, by arm; runs that were trained as one share it."""
    file = options.out / f"{plan.table}.json"
    rows = read_table(file).rows if file.exists() else ()
    for arm in plan.arms:
        taken = [1000 * row.seconds / row.steps for row in rows if row.arm == arm and row.seconds]
        if taken:
            print(f"{plan.table} {arm}: {len(taken)} runs, {min(taken):.2f} to {max(taken):.2f} ms a step")


def part(plan: Plan, arm: str, options: argparse.Namespace) -> Path:
    """The table of one arm."""
    return options.runs / "parts" / plan.table / f"{arm}.json"


def gather(plan: Plan, options: argparse.Namespace, packed: set[str]) -> None:
    """Joins the tables of the arms, and packs the models that are kept of those that are done."""
    found = {arm: read_table(part(plan, arm, options)) for arm in plan.arms if part(plan, arm, options).exists()}
    if not found:
        return
    table = reduce(joined, found.values())
    save_result(table, options.out / f"{plan.table}.json")
    open_arms = {run.arm for run in {*plan.runs()} - table.done()}
    for arm in found.keys() - open_arms:
        for seed, row in table.best_rows(arm).items():
            name = f"{plan.table}/{arm}/{seed}"
            if name in {*options.keep} - packed:
                packed.add(name)
                output = Path(plan.recipe_of(row.run, options.runs / arm / plan.table).output)
                pack(output, f"{plan.table}/{row.run}", options.out)


def pack(run: Path, name: str, folder: Path) -> None:
    """Puts a run's model and results into the first archive that has room for them."""
    kept = [run / "model", run / RESULTS]
    size = sum(file.stat().st_size for path in kept for file in (path.iterdir() if path.is_dir() else [path]))
    archive = next(
        path
        for path in (folder / f"models-{number}.tar" for number in itertools.count())
        if not path.exists() or path.stat().st_size + size < LARGEST_ARCHIVE
    )
    with tarfile.open(archive, "a") as tar:
        for path in kept:
            tar.add(path, arcname=f"{name}/{path.name}")


if __name__ == "__main__":
    sys.exit(main())
