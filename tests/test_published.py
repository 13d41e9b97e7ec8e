"""Published figures come from published measurements: what the documentation says is what is in results/."""

import json
import re

import pytest
from examples.demo import TITLES
from scripts import depth_batches, exit_rules


@pytest.mark.parametrize("path", sorted((exit_rules.ROOT / "results").glob("*-exit-rules.json")), ids=lambda p: p.stem)
def test_the_tables_of_exit_rules_are_those_of_the_measurement(path) -> None:
    measured = json.loads(path.read_text(encoding="utf-8"))
    assert exit_rules.tables(measured, path.stem) in exit_rules.PAGE.read_text(encoding="utf-8")
    assert (exit_rules.ROOT / "docs" / "figures" / f"{path.stem}.png").is_file()
    assert {"command", "commit", "versions", "machine"} <= measured.keys()
    assert "/home/" not in json.dumps(measured)


def test_the_table_of_batches_over_depth_is_that_of_the_measurement() -> None:
    measured = json.loads(depth_batches.RESULT.read_text(encoding="utf-8"))
    assert depth_batches.table(measured) in depth_batches.PAGE.read_text(encoding="utf-8")
    assert depth_batches.FIGURE.is_file()
    assert all(of["equal"] == 1 for of in depth_batches.by_rows(measured).values())


def test_the_run_in_the_readme_is_that_of_the_results() -> None:
    """If it fails after a new run of the demo: the expected lines are what belongs there."""
    run = json.loads((exit_rules.ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
    answers, text, cycles = run["drafts"]["answers"], run["text"], run["model"]["cycles"]
    assert all(answer["equal"] for answer in answers)
    lines = [
        f"{shortened(answer['prompt']):<27}{answer['tokens_per_second']:>6.1f} tokens/s, "
        f"transformers {answer['plain_tokens_per_second']:.1f}: {answer['speedup']:.2f}x, "
        f"{answer['mat']:.2f} tokens a pass"
        for answer in answers
    ]
    lines += [f"ztt-million-exits: {run['model']['parameters']:,} parameters, {cycles} cycles"]
    lines += [
        f"batch {row['batch']:>2}: off {row['off']:,.0f}, on {row['on']:,.0f} tokens/s: {row['speedup']:.2f}x"
        for row in run["speed"]
    ]
    lines += [
        f"FLOPs per token: {text['off']['flops_per_token']:,.0f} off, {text['on']['flops_per_token']:,.0f} on: "
        f"{text['flops_saved']:.1%} saved at {text['on']['mean_cycles']:.2f} of {cycles} cycles a token",
        f"loss per token: {text['off']['loss']:.4f} off, {text['on']['loss']:.4f} on",
    ]
    lines += [
        f"{title}: {run['pair'][name]['parameters']:,} parameters, loss {run['pair'][name]['loss']:.4f} on pages that "
        "neither has seen"
        for name, title in TITLES.items()
    ]
    readme = (exit_rules.ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\nsmollm2: .*\n((?:.*\n)*?)```$", readme, re.MULTILINE)
    assert block.splitlines() == lines, "README.md should have\n" + "\n".join(lines)


@pytest.mark.parametrize(("name", "arm"), [("ztt-million", "ztt-input"), ("vanilla-million", "vanilla")])
def test_the_cards_of_the_pair_have_the_figures_of_the_results(name: str, arm: str) -> None:
    table = json.loads((exit_rules.ROOT / "results" / "evidence" / "million.json").read_text(encoding="utf-8"))
    runs = {(row["arm"], row["rate"], row["seed"]): row["losses"] for row in table["rows"]}
    own, vanilla = runs[arm, "1e-2", 0], runs["vanilla", "1e-2", 0]
    card = (exit_rules.ROOT / "models" / name / "README.md").read_text(encoding="utf-8")
    for text, title in (("validation", "validation"), ("wikitext2", "WikiText-2")):
        losses = [*own[text], *(vanilla[text] if arm != "vanilla" else ())]
        assert f"| {title} | {' | '.join(f'{loss:.4f}' for loss in losses)} |" in card


def shortened(prompt: str) -> str:
    """The beginning of a long prompt, to the end of a word or sentence."""
    return prompt if len(prompt) < 24 else prompt[: prompt.rindex(" ", 0, 24)] + " ..."


def test_the_line_of_fixed_depths() -> None:
    rows = [
        {
            "rule": None,
            "mean_cycles": c,
            "depths": [],
            "flops_per_token": f,
            "flops": f,
            "loss": loss,
            "loss_increase": 0.0,
        }
        for c, f, loss in ((1.0, 0.5, 4.0), (2.0, 1.0, 3.0))
    ]
    fixed = exit_rules.points(rows)
    assert exit_rules.loss_on_line(fixed, 0.75) == pytest.approx(3.5)
    assert exit_rules.loss_on_line(fixed, 0.4) is None
