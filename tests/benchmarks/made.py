"""Results that look like those of a real run."""

from typing import Any

from evidence_plan import Plan, Run
from evidence_table import Row


def made_row(plan: Plan, arm: str, seed: int, loss: float, rate: str = "1e-2", **values: Any) -> Row:
    """A result as a run would have it."""
    row: dict[str, Any] = {
        "parameters": 1000, "layer_parameters": 300, "steps": 4, "tokens": 80_000, "flops": 10**9, "seconds": 60.0,
        "losses": {"validation": (loss + 0.1, loss), "other": (loss + 1.0,)}, "curve": ((2, 5.0), (4, 4.0)),
        "provenance": {"command": f"python benchmarks/evidence.py run x --only {arm}/{rate}/{seed}"},
    }  # fmt: skip
    run = Run(arm, rate, seed)
    return Row(**run._asdict(), recipe=plan.changes_of(run), **{**row, **values})
