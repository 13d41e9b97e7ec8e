"""Evidence for Zero Token Transformers: the same text and seeds for all arms of a plan, and a report with intervals.

    ZERODRAFT_DATA=DIR python benchmarks/evidence.py run recipes/evidence/small.yaml --minutes 60
    python benchmarks/evidence.py run recipes/evidence/small.yaml --list
    python benchmarks/evidence.py join DIR/million.json
    python benchmarks/evidence.py report

`run` goes on where it was stopped or killed. A row of the report is made again by the command beside it, with another
`--results` and `--runs`, so that what is done there is not taken for it. `join` adds runs that were made elsewhere.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from evidence_plan import read_plan
from evidence_report import write_report
from evidence_runs import make_runs, progress
from evidence_table import joined, read_table, save_result
from harness import quiet_transformers
from zerodraft.cli.main import log_to_stderr
from zerodraft.common.errors import ZerodraftError

ROOT = Path(__file__).parent.parent


def main(words: Sequence[str] | None = None) -> int:
    """Runs or reports; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs of a plan")
    run.add_argument("plan", type=Path, metavar="PLAN.yaml")
    run.add_argument("--list", action="store_true", help="show what is done and what is left, and run nothing")
    run.add_argument("--only", metavar="NAME", help="only the runs of this name: ARM, ARM/RATE or ARM/RATE/SEED")
    run.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run after this time; stop at a checkpoint"
    )
    run.add_argument("--together", type=int, default=1, metavar="N", help="train up to N runs of an arm as one")
    run.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence", help="folder for the runs")
    join = commands.add_parser("join", help="add runs of a table that were made elsewhere")
    join.add_argument("part", type=Path, metavar="TABLE.json")
    report = commands.add_parser("report", help="write the page and its figures from all tables")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md")
    for command in (run, join, report):
        command.add_argument("--results", type=Path, default=ROOT / "results" / "evidence", help="folder of the tables")
    options = parser.parse_args(words)
    log_to_stderr(logging.INFO)
    quiet_transformers()
    try:
        if options.command == "report":
            write_report(options.results, options.page)
            return 0
        if options.command == "join":
            part = read_table(options.part)
            file = options.results / f"{part.plan.table}.json"
            save_result(joined(read_table(file), part) if file.exists() else part, file)
            return 0
        plan = read_plan(options.plan)
        file = options.results / f"{plan.table}.json"
        if options.list:
            print("\n".join(progress(plan, file, options.runs, options.only)))
            return 0
        command = ["python", "benchmarks/evidence.py", "run", str(options.plan)]
        make_runs(
            plan, file, options.runs, words=command, only=options.only, minutes=options.minutes,
            together=options.together,
        )  # fmt: skip
    except ZerodraftError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
