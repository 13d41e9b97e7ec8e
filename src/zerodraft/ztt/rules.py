"""The exit rules by name, one line each: what configurations, calibration, plots and the command line go by.

A new rule is a class (see `exits`) and a line in `RULES`. No torch here, so that the command line can offer them at
once; what a rule reads and where its threshold stops a token (`reads_zero_mass`, `sign`) its class says.
"""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from zerodraft.common.errors import ZerodraftError, did_you_mean

if TYPE_CHECKING:
    from zerodraft.ztt.exits import ExitRule


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


NEVER = "never"
"""The threshold of a cycle after which nobody stops."""

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


def has_masses(config: Any) -> bool:
    """Whether there is a zero token in a cycle after which a token could leave, any but the last one."""
    return config.zero_tokens and config.zero_token_start < config.cycles


def name_of(rule: type[Any]) -> str | None:
    """The name of a rule's class; None if it is not registered."""
    return next((name for name, entry in RULES.items() if entry.rule is rule), None)


def written_rules() -> list[str]:
    """Every rule with its example, as people write it: `zero-mass:0.5`."""
    return [f"{name}:{entry.example}" for name, entry in RULES.items()]


def parse_exit_rule(text: str, calibrated: dict[str, Any] | None) -> "ExitRule | None":
    """The rule that `text` describes, None for `off`.

    Args:
        text: `NAME:VALUE`, `NAME:VALUE,VALUE,...` with a threshold for each cycle but the last, `calibrated` or `off`.
        calibrated: what `zerodraft calibrate` wrote into the model's config.

    Raises:
        ZerodraftError: an unknown name, a value that is missing, superfluous or not a number, or a model without a
            calibrated rule.
    """
    from zerodraft.ztt.exits import exit_rule_from_dict

    name, colon, value = text.strip().partition(":")
    if name in ("off", "calibrated") and not colon:
        if name == "off":
            return None
        if calibrated is None:
            raise ZerodraftError(
                "this model has no calibrated exit rule: run 'zerodraft calibrate' on it, or give a rule and its "
                "threshold, such as zero-mass:0.5"
            )
        return exit_rule_from_dict(calibrated)
    if name not in RULES:
        if name in ("off", "calibrated"):
            raise ZerodraftError(f"exit rule '{text}' has a value after the colon; '{name}' takes none: leave it out")
        raise ZerodraftError(f"unknown exit rule '{name}'{did_you_mean(name, ['off', 'calibrated', *RULES])}")
    entry = RULES[name]
    try:
        given = _read_value(value, entry)
    except ValueError:
        kind = "a whole number" if entry.is_whole else "a number, or one for each cycle but the last,"
        *first, last = "off", "calibrated", *written_rules()
        raise ZerodraftError(
            f"exit rule '{text}' needs {kind} after the colon; expected one of {', '.join(first)} or {last}"
        ) from None
    return entry.rule(**{entry.parameter: given})


def _read_value(text: str, entry: RuleEntry) -> Any:
    """`2`, `0.5`, or `0.3,never,0.5`: a threshold for each cycle but the last."""
    if entry.is_whole:
        return int(text)
    each = [None if one.strip() == NEVER and "," in text else float(one) for one in text.split(",")]
    return tuple(each) if len(each) > 1 else each[0]


def rule_text(data: dict[str, Any]) -> str:
    """A stored rule as people write it, rounded: `zero-mass:0.4321`, `latent:0.3,never,0.5`."""
    value = data[RULES[data["rule"]].parameter]
    each = value if isinstance(value, (list, tuple)) else [value]
    return f"{data['rule']}:{','.join(NEVER if one is None else f'{one:.4g}' for one in each)}"


def rule_of(model: Any, text: str) -> Any:
    """The exit rule that a text means for a model, None without one.

    Raises:
        ZerodraftError: the model has no cycles to leave, there is no such rule, or it has thresholds for another number
            of cycles.
    """
    is_ztt = model.config.model_type == "ztt"
    if text != "off" and not is_ztt:
        raise ZerodraftError(
            f"the exit rule '{text}' is for Zero Token Transformers, and this is a plain {model.config.model_type} "
            "model: leave it out"
        )
    rule = parse_exit_rule(text, model.config.exit_rule if is_ztt else None)
    if rule is not None:
        from zerodraft.ztt.exits import check_rule

        check_rule(rule, model.config.cycles)
    return rule
