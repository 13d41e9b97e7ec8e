"""Published figures come from published measurements: what the documentation says is what is in results/."""

import json

import pytest
from scripts import exit_rules


@pytest.mark.parametrize("path", sorted((exit_rules.ROOT / "results").glob("*-exit-rules.json")), ids=lambda p: p.stem)
def test_the_tables_of_exit_rules_are_those_of_the_measurement(path) -> None:
    measured = json.loads(path.read_text(encoding="utf-8"))
    assert exit_rules.tables(measured, path.stem) in exit_rules.PAGE.read_text(encoding="utf-8")
    assert (exit_rules.ROOT / "docs" / "figures" / f"{path.stem}.png").is_file()
    assert {"command", "commit", "versions", "machine"} <= measured.keys()
    assert "/home/" not in json.dumps(measured)


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
    assert exit_rules.on_line(fixed, 0.75) == pytest.approx(3.5)
    assert exit_rules.on_line(fixed, 0.4) is None
