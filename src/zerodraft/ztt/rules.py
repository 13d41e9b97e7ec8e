"""The exit rules by name, one line each: what configurations, calibration, plots and the command line go by.

A new rule is a class (see `exits`) and a line in `RULES`. No torch here, so that the command line can offer them at
once; what a rule reads and where its threshold stops a token (`reads_zero_mass`, `sign`) its class says.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleEntry:
    """One line of the registry.

    Attributes:
        where: `module:class` of the rule, a frozen dataclass. One with a threshold is a `ScoredRule`, and calibration
            places the threshold at quantiles of its scores.
        parameter: What people give with the name.
        example: A value of it that makes sense; all values are of its type.
        colour: Of the rule's line in plots; None for the next one of matplotlib.
    """

    where: str
    parameter: str = "threshold"
    example: float
    colour: str | None = None

    @property
    def rule(self) -> type[Any]:
        """The class."""
        return resolve_name(self.where)

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is a whole number."""
        return isinstance(self.example, int)


RULES = {
    "zero-mass": RuleEntry(where="zerodraft.ztt.exits:ZeroMassExit", example=0.5, colour="#d1495b"),
    "confidence": RuleEntry(where="zerodraft.ztt.exits:ConfidenceExit", example=0.9, colour="#00798c"),
    "entropy": RuleEntry(where="zerodraft.ztt.exits:EntropyExit", example=1.0, colour="#edae49"),
    "kl": RuleEntry(where="zerodraft.ztt.exits:KlExit", example=0.01, colour="#5b5f97"),
    "latent": RuleEntry(where="zerodraft.ztt.exits:LatentExit", example=0.1, colour="#66a182"),
    "cycles": RuleEntry(where="zerodraft.ztt.exits:FixedExit", parameter="cycles", example=2),
}


def scored_names() -> tuple[str, ...]:
    """The rules with a threshold, which can be found by measuring."""
    return tuple(name for name, entry in RULES.items() if entry.parameter == "threshold")


def name_of(rule: type[Any]) -> str | None:
    """The name of a rule's class; None if it is not registered."""
    return next((name for name, entry in RULES.items() if entry.rule is rule), None)


def written_rules() -> list[str]:
    """Every rule with its example, as people write it: `zero-mass:0.5`."""
    return [f"{name}:{entry.example}" for name, entry in RULES.items()]
