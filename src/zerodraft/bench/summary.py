"""From measured prompts to the figures of a result: per method, overall and by task.

Speed is all tokens over all seconds; a speedup is the ratio of two speeds in one run, given with its spread over the
prompts. MAT (mean accepted tokens) is new tokens per pass of the target, its own token counted and the prompt's pass
not, over all prompts together.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zerodraft.bench.decode import Row, unexplained
from zerodraft.bench.measure import spread
from zerodraft.bench.methods import BASE, FULL, OWN_PLAIN, writes_the_same


def headline(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """What one wants to know first, of `full` (or else the last of our methods).

    `equal` says that all our methods wrote the base's tokens, near ties aside; None where tokens were sampled or there
    are none to compare.
    """
    ours = [name for name in names if writes_the_same(name)]
    subject = FULL if FULL in names else next(reversed(ours), None)
    overall = by_method(rows, names)
    records = [row["methods"][name] for row in rows for name in ours]
    compared = [record for record in records if "equal" in record]

    def over(base: str | None) -> float | None:
        if subject is None or base not in overall or "tokens_per_second" not in overall[subject]:
            return None
        return overall[subject]["tokens_per_second"] / overall[base]["tokens_per_second"]

    theirs = [name for name in names if name.startswith("hf_") and "tokens_per_second" in overall[name]]
    best = max(theirs, key=lambda name: overall[name]["tokens_per_second"], default=None)
    return {
        "subject": subject,
        "mat": overall[subject]["mat"] if subject else None,
        "equal": not any(map(unexplained, compared)) if compared else None,
        "identical": all(record["equal"] for record in compared) if compared else None,
        "speedup_over_hf_plain": over(BASE),
        "speedup_over_hf_best": over(best),
        "hf_best": best,
        "speedup_over_own_plain": over(OWN_PLAIN),
        "prompts_measured": len(rows),
    }


def figures(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Everything else that follows from the rows."""
    tasks = {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)}
    ours = [name for name in names if any("steps" in row["methods"][name] for row in rows)]
    timed = [name for name in names if any("phases" in row["methods"][name] for row in rows)]
    return {
        "overall": by_method(rows, names),
        "by_task": {task: by_method(part, names) for task, part in tasks.items()},
        "acceptance": {name: _acceptance(rows, name) for name in ours},
        "phases": {name: _phases(rows, name) for name in timed},
        "steps": {name: {task: _steps(part, name) for task, part in tasks.items()} for name in ours},
        "differences": [
            {
                "id": row["id"],
                "method": name,
                "place": record["first_difference"],
                "top_gap": record.get("top_gap"),
                "deficit": record.get("deficit"),
                "near_tie": record["near_tie"],
            }
            for row in rows
            for name, record in row["methods"].items()
            if record.get("equal") is False
        ],
        "prompts": [_compact(row) for row in rows],
    }


def by_method(rows: Sequence[Row], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Per method: speed and its spread over prompts, speedup over the base, MAT, equality."""
    return {name: _summary([row["methods"] for row in rows], name) for name in names}


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    mine = [row[name] for row in rows]
    tokens = sum(record["count"] for record in mine)
    summary: dict[str, Any] = {"prompts": len(mine), "tokens": tokens}
    if all("seconds" in record for record in mine):
        speeds = [record["count"] / record["seconds"] for record in mine]
        summary["tokens_per_second"] = tokens / sum(record["seconds"] for record in mine)
        summary["tokens_per_second_by_prompt"] = spread(speeds)
        if all("seconds" in row.get(BASE, {}) for row in rows):
            base = [row[BASE]["count"] / row[BASE]["seconds"] for row in rows]
            whole = sum(row[BASE]["count"] for row in rows) / sum(row[BASE]["seconds"] for row in rows)
            summary["speedup"] = summary["tokens_per_second"] / whole
            summary["speedup_by_prompt"] = spread([a / b for a, b in zip(speeds, base, strict=True)])
    passes = [_passes(record) for record in mine]
    known = [(record["count"] - 1, made) for record, made in zip(mine, passes, strict=True) if made]
    summary["mat"] = sum(new for new, _ in known) / sum(made for _, made in known) if known else None
    if all("equal" in record for record in mine):
        different = [record for record in mine if not record["equal"]]
        summary["equal"] = len(mine) - len(different)
        summary["near_ties"] = sum(record["near_tie"] for record in different)
    return summary


def speedup_interval(prompts: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Where the speedup, all tokens over all seconds, of other prompts of the same kind would lie in 19 of 20 cases: by
    drawing from these prompts again and again (bootstrap). `prompts` are those of a result."""
    known = [[row[key][method] for row in prompts] for method in (name, BASE) for key in ("count", "seconds")]
    drawn = np.random.default_rng(0).integers(len(prompts), size=(2000, len(prompts)))
    tokens, seconds, base_tokens, base_seconds = np.array(known)[:, drawn].sum(-1)
    low, high = np.quantile(tokens / seconds / (base_tokens / base_seconds), (0.025, 0.975))
    return float(low), float(high)


def _passes(record: Mapping[str, Any]) -> int | None:
    """Passes of the target after the prompt's."""
    return len(record["steps"]) if "steps" in record else record.get("passes")


def _acceptance(rows: Sequence[Row], name: str) -> dict[str, list[int]]:
    """How many drafts had a token at each position, and of how many it was accepted."""
    totals = {}
    for key in ("tried_at", "accepted_at"):
        counts = [row["methods"][name].get(key, []) for row in rows]
        totals[key] = [sum(column) for column in _columns(counts)]
    return totals


def _columns(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    width = max(map(len, rows), default=0)
    return [[row[at] for row in rows if at < len(row)] for at in range(width)]


def _phases(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Seconds in each phase, over all prompts."""
    found = [row["methods"][name]["phases"] for row in rows]
    return {phase: sum(seconds[phase] for seconds in found) for phase in found[0]}


def _steps(rows: Sequence[Row], name: str) -> list[list[int]]:
    """Every kind of step: [drafted tokens, accepted of them, how often it happened, whether a model drafted]."""
    counts = Counter(tuple(step) for row in rows for step in row["methods"][name].get("steps", []))
    return [[drafted, accepted, times, by_model] for (drafted, accepted, by_model), times in sorted(counts.items())]


def _compact(row: Row) -> dict[str, Any]:
    """A prompt's own figures, for whoever wants to check the sums."""
    methods = row["methods"]
    kept = {key: {name: record.get(key) for name, record in methods.items()} for key in ("count", "seconds")}
    kept["mat"] = {
        name: (record["count"] - 1) / made if (made := _passes(record)) else None for name, record in methods.items()
    }
    return {"id": row["id"], "task": row["task"], "prompt_tokens": row["prompt_tokens"], **kept}


def line(rows: Sequence[Row], names: Sequence[str]) -> str:
    """How it stands, in a line."""
    told = []
    for name, values in by_method(rows, names).items():
        speed = f" {values['speedup']:.2f}x" if "speedup" in values else ""
        mat = f" MAT {values['mat']:.2f}" if values["mat"] is not None and writes_the_same(name) else ""
        equal = f" ({values['equal']}/{len(rows)})" if "equal" in values and name != BASE else ""
        told.append(f"{name}{speed}{mat}{equal}")
    return ", ".join(told)
