"""Publishes a comparison of exit rules: results/NAME.json, docs/figures/NAME.png and the tables in docs/early-exit.md.

    zerodraft calibrate models/ztt-million-exits --text TEXT --rules all --max-loss-increase 0.02
    python scripts/exit_rules.py models/ztt-million-exits/calibration.json

Without a file it draws the figure and writes the tables again from what is in results/.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zerodraft import ZttForCausalLM, exit_rule_from_dict
from zerodraft.common.outputs import write_json, write_whole
from zerodraft.ztt.calibrate import LossBound, write_exit_rule
from zerodraft.ztt.compare import on_line
from zerodraft.ztt.plot import plot_trade_off
from zerodraft.ztt.rules import rule_text
from zerodraft.ztt.tradeoff import Point

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "early-exit.md"
BEGIN, END = "<!-- written by scripts/exit_rules.py -->", "<!-- end of what scripts/exit_rules.py wrote -->"
BUDGETS = (0.7, 0.8, 0.9, 1.0)


def main(words: Sequence[str] | None = None) -> None:
    """Copies a new measurement into results/ if one is given, then writes everything that follows from it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("calibration", type=Path, nargs="?", help="calibration.json of `zerodraft calibrate`")
    parser.add_argument(
        "--max-loss-increase", type=float, help="choose again among the measured points, for this bound"
    )
    parser.add_argument("--model", type=Path, help="write the chosen rule into this model's config.json")
    parser.add_argument("--name", default="ztt-million-exit-rules", help="of the files in results/ and docs/figures/")
    options = parser.parse_args(words)
    stored = ROOT / "results" / f"{options.name}.json"
    if options.calibration is not None:
        measured = json.loads(options.calibration.read_text(encoding="utf-8"))
        if options.max_loss_increase is not None:
            choose_again(measured, options.max_loss_increase)
        write_json(stored, {**measured, "commit": commit()}, indent=1)
    measured = json.loads(stored.read_text(encoding="utf-8"))
    if options.model is not None:
        rule = exit_rule_from_dict(measured["rule"])
        write_exit_rule(ZttForCausalLM.from_pretrained(options.model), rule, options.model)
    figure = ROOT / "docs" / "figures" / f"{options.name}.png"
    plot_trade_off(
        figure,
        {name: points(rule["curve"]) for name, rule in measured["rules"].items()},
        fixed=points(measured["fixed"]),
        chosen=points([measured["chosen"]])[0],
        title=f"{options.name.removesuffix('-exit-rules')} on {short(measured['text'])}",
    )
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    write_whole(PAGE, before + BEGIN + "\n\n" + tables(measured, options.name) + "\n" + END + after)


def choose_again(measured: dict[str, Any], bound: float) -> None:
    """Put the best measured points for another bound in place; nothing is measured."""
    target = LossBound(relative=bound)
    found = []
    for rule in measured["rules"].values():
        met = [point for point in points(rule["curve"]) if target.met_by(point)]
        found += [target.best(met)] if met else []
        rule["chosen"] = asdict(target.best(met)) if met else None
    measured["chosen"] = asdict(target.best(found))
    measured["rule"] = measured["chosen"]["rule"]
    measured["target"] = {"relative": bound}
    # they are of the other choice
    for name in ("loss_increase_interval", "against_fixed", "best_fixed", "verdict"):
        measured.pop(name, None)
    measured["command"] += f", then scripts/exit_rules.py --max-loss-increase {bound:g}"


def commit() -> str:
    """The commit that the measurement was published on."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Measurements from JSON."""
    return [Point(**{**row, "depths": tuple(row["depths"])}) for row in rows]


def short(text: Mapping[str, Any]) -> str:
    """The last two parts of the text's path: `wikitext2/valid.txt`."""
    return "/".join(Path(text["name"]).parts[-2:])


def tables(measured: Mapping[str, Any], name: str) -> str:
    """What was measured, in Markdown."""
    full, fixed = points([measured["full"]])[0], points(measured["fixed"])
    text = measured["text"]
    lines = [
        f"`{measured['command']}`",
        "",
        f"{measured['tokens']:,} tokens of `{short(text)}` in blocks of {measured['block_length']}, policy "
        f"`{measured['policy']}`; torch {measured['versions']['torch']}, transformers "
        f"{measured['versions']['transformers']}; all measurements: [results/{name}.json](../results/{name}.json).",
        "",
        f"![Loss over the share of FLOPs, a line for each rule](figures/{name}.png)",
        "",
        "| exit rule | cycles per token | FLOPs | loss | increase | against fixed depths |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| none | {full.mean_cycles:.2f} | 100.0% | {full.loss:.4f} | | |",
    ]
    lines += [row(f"`cycles:{cycles}`", point, None) for cycles, point in enumerate(fixed[:-1], 1)]
    for rule, found in measured["rules"].items():
        if found["chosen"] is None:
            lines.append(f"| `{rule}` | no exits meet the target | | | | |")
            continue
        point = points([found["chosen"]])[0]
        assert point.rule is not None
        lines.append(row(f"`{rule_text(point.rule)}`", point, loss_on_line(fixed, point.flops)))
    lines += [
        "",
        f"Each rule is shown at its best measured threshold for the target {target(measured)}. *Against fixed "
        "depths*: its loss minus that of the straight line between the fixed depths at the same FLOPs; below zero, "
        "choosing the depth for each token pays.",
        *(["", f"The chosen rule with 95% intervals: {measured['verdict']}"] if "verdict" in measured else []),
        "",
        "The lowest loss that was measured with at most this share of the FLOPs:",
        "",
        "| | " + " | ".join(f"{budget:.0%}" for budget in BUDGETS) + " |",
        "| --- |" + " --- |" * len(BUDGETS),
    ]
    curves = {"same depth for all": fixed} | {
        f"`{rule}`": points(found["curve"]) for rule, found in measured["rules"].items()
    }
    for label, curve in curves.items():
        best = [min((p.loss for p in curve if p.flops <= budget + 1e-9), default=None) for budget in BUDGETS]
        lines.append(f"| {label} | " + " | ".join("-" if loss is None else f"{loss:.4f}" for loss in best) + " |")
    return "\n".join(lines) + "\n"


def row(label: str, point: Point, line: float | None) -> str:
    """One line of the first table."""
    gap = "" if line is None else f"{point.loss - line:+.4f}"
    increase = f"{point.loss_increase:+.4f} ({point.relative_increase:+.2%})"
    return f"| {label} | {point.mean_cycles:.2f} | {point.flops:.1%} | {point.loss:.4f} | {increase} | {gap} |"


def loss_on_line(fixed: Sequence[Point], flops: float) -> float | None:
    """Loss of the polyline through the fixed depths; None beyond its ends."""
    line = sorted(fixed, key=lambda point: point.flops)
    if not line[0].flops <= flops <= line[-1].flops:
        return None
    left, right, share = on_line(line, flops)
    return left.loss + share * (right.loss - left.loss)


def target(measured: Mapping[str, Any]) -> str:
    """The target in words."""
    ((name, value),) = measured["target"].items()
    words = {
        "flops": f"of at most {value:.0%} of the FLOPs",
        "mean_cycles": f"of at most {value:g} cycles per token",
        "relative": f"of at most {value:.1%} more loss",
        "absolute": f"of at most {value:g} nats more loss",
    }
    return words[name]


if __name__ == "__main__":
    main()
