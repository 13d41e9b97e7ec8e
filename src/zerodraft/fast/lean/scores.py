"""Exit rules in the form in which the compiled pass asks them after each cycle: a score for every token, and the
threshold where one stops. Rules that read logits, and those of users, have none and are asked in Python.
"""

from dataclasses import dataclass, replace
from math import inf, nan
from typing import Literal

from zerodraft.fast.lean.ztt import Stages
from zerodraft.ztt.exits import AtLeast, ExitRule, FixedExit, LatentExit, ZeroMassExit


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """How tokens are scored.

    Attributes:
        kind: Minus the latent difference, or what is made of the zero tokens' masses.
        layers: Those of a cycle whose masses are read.
        thresholds: After each cycle but the last the score from which on a token stops; NaN: nobody does.
    """

    kind: Literal["latent", "mean", "max", "min"]
    layers: range
    thresholds: tuple[float, ...]


def scores_of(rule: ExitRule, stages: Stages) -> Scores | None:
    """A rule's scores, or None for one that only Python can ask."""
    asked, shared = range(1, stages.cycles), stages.shared_layers
    if isinstance(rule, AtLeast):
        if (scores := scores_of(rule.rule, stages)) is None:
            return None
        each = (nan if cycle < rule.cycles else one for cycle, one in zip(asked, scores.thresholds, strict=True))
        return replace(scores, thresholds=tuple(each))
    if type(rule) is FixedExit:
        # without a mass to read the score is minus infinity
        each = (-inf if cycle >= rule.cycles else nan for cycle in asked)
        return Scores(kind="max", layers=range(0), thresholds=tuple(each))
    if type(rule) not in (ZeroMassExit, LatentExit):
        return None
    assert isinstance(rule, (ZeroMassExit, LatentExit))
    thresholds = (rule.threshold_after(cycle) for cycle in asked)
    each = tuple(nan if threshold is None else rule.sign * threshold for threshold in thresholds)
    if isinstance(rule, LatentExit):
        return Scores(kind="latent", layers=range(0), thresholds=each)
    layers = {"all": range(shared), "first": range(1), "last": range(shared - 1, shared)}[rule.layers]
    return Scores(kind=rule.pool, layers=layers, thresholds=each)
