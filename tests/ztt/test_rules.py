"""The registry of exit rules: what is registered is what everything offers, a rule of one's own included."""

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from jaxtyping import Float
from torch import Tensor

from tests.ztt.tiny import tiny, tokens
from zerodraft import CycleOutput, exit_rule_from_dict, exit_rule_to_dict
from zerodraft.ztt.calibrate import ComputeBudget, calibrate
from zerodraft.ztt.exits import ReadingRule, ScoredRule
from zerodraft.ztt.rules import RULES, RuleEntry, name_of, parse_exit_rule, scored_names, written_rules

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallExit(ScoredRule):
    """Stop where the state is at most so long."""

    sign: ClassVar[float] = -1.0

    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        return -out.hidden.norm(dim=-1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "small", RuleEntry(where=f"{__name__}:SmallExit", example=3.5))


@pytest.mark.parametrize("name", RULES)
def test_a_line_says_what_its_class_is(name: str) -> None:
    entry = RULES[name]
    assert entry.parameter in {field.name for field in fields(entry.rule)}
    assert issubclass(entry.rule, ScoredRule) == (name in scored_names())
    rule = parse_exit_rule(f"{name}:{entry.example}", None)
    assert type(rule) is entry.rule
    assert isinstance(rule, ReadingRule)
    assert getattr(rule, entry.parameter) == entry.example
    assert name_of(entry.rule) == name


def test_the_page_of_the_commands_has_all_rules() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [rule for rule in written_rules() if f"\n| `{rule}` | " not in page] == []


def test_a_rule_of_ones_own_has_a_name(small: None) -> None:
    rule = parse_exit_rule("small:2", None)
    assert rule == SmallExit(threshold=2.0)
    assert exit_rule_from_dict(exit_rule_to_dict(rule)) == rule


def test_a_rule_of_ones_own_is_calibrated(small: None) -> None:
    target = ComputeBudget(mean_cycles=2)
    result = calibrate(tiny("llama"), tokens(4, 16), "small", target=target, levels=(0.2, 1.0), halvings=1)
    assert isinstance(result.rule, SmallExit)
    assert result.chosen.mean_cycles <= 2


@pytest.mark.parametrize(
    ("command", "shown"), [("calibrate", "latent,small,best}"), ("generate", "cycles:2, small:3.5,")]
)
def test_the_help_offers_it(command: str, shown: str) -> None:
    code = (
        "from zerodraft.ztt.rules import RULES, RuleEntry; from zerodraft.cli.main import main; "
        f"RULES['small'] = RuleEntry(where='{__name__}:SmallExit', example=3.5); main(['{command}', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert shown in " ".join(done.stdout.split()), done.stderr
