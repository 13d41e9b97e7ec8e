"""Exit rules as people write them: `zero-mass:0.5`, `confidence:0.9`, `cycles:2`, `calibrated`, `off`."""

from typing import TYPE_CHECKING, Any

from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.ztt.rules import RULES, written_rules

if TYPE_CHECKING:
    from zerodraft.ztt.exits import ExitRule


def parse_exit_rule(text: str, calibrated: dict[str, Any] | None) -> "ExitRule | None":
    """The rule that `text` describes, None for `off`.

    Args:
        text: `NAME:VALUE`, `calibrated` or `off`.
        calibrated: what `zerodraft calibrate` wrote into the model's config.

    Raises:
        ZerodraftError: unknown name, no value, a value that is not a number, or nothing calibrated yet.
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
        raise ZerodraftError(f"unknown exit rule '{name}'{did_you_mean(name, ['off', 'calibrated', *RULES])}")
    entry = RULES[name]
    try:
        number = int(value) if entry.is_whole else float(value)
    except ValueError:
        kind = "a whole number" if entry.is_whole else "a number"
        *first, last = "off", "calibrated", *written_rules()
        raise ZerodraftError(
            f"exit rule '{text}' needs {kind} after the colon; expected one of {', '.join(first)} or {last}"
        ) from None
    return entry.rule(**{entry.parameter: number})
