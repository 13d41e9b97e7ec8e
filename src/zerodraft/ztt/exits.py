"""Rules that decide after each cycle which tokens have been thought about enough.

A rule sees what one cycle produced for the tokens that still run, and returns which of them stop. Nothing in it depends
on other tokens, so results do not depend on the batch. The zero-token rule is the papers' (Li et al., 2025/2026);
softmax confidence and entropy are the usual readouts (e.g. CALM), KL and latent difference those of recurrent-depth
models. Every rule with a threshold takes one for all cycles or one for each cycle but the last.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.rules import RULES, name_of

ExitPolicy = Literal["propagate", "latest"]
HeadPool = Literal["mean", "max", "min"]
LayerChoice = Literal["all", "first", "last"]


@dataclass(frozen=True, slots=True)
class CycleOutput:
    """What one cycle produced for its n tokens.

    Attributes:
        cycle: Number of the cycle, from 1.
        hidden: State after the cycle.
        previous: State before the cycle.
        zero_mass: Attention mass on the zero token by shared layer and head, or None in a cycle without zero tokens.
        readout: Logits of a state, through the final norm and the LM head (without the tail layers).
    """

    cycle: int
    hidden: Float[Tensor, "n d"]
    previous: Float[Tensor, "n d"]
    zero_mass: Float[Tensor, "n layers heads"] | None
    readout: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n v"]]


@runtime_checkable
class ExitRule(Protocol):
    """Decides which tokens stop after a cycle; a function will do. See `ReadingRule` for one without zero masses."""

    def __call__(self, out: CycleOutput) -> Bool[Tensor, " n"]:
        """True for the tokens that stop."""
        ...


@runtime_checkable
class ReadingRule(ExitRule, Protocol):
    """A rule that says what it looks at; the base class of a rule of your own.

    Attributes:
        reads_zero_mass: Whether it looks at the zero-token mass; if not, the mass is not computed, and None.
    """

    reads_zero_mass: ClassVar[bool] = True


def reads_zero_mass(rule: ExitRule) -> bool:
    """Whether a rule looks at the zero-token mass; one that does not say may."""
    return not isinstance(rule, ReadingRule) or rule.reads_zero_mass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRule(ABC):
    """A rule that stops tokens whose score is high enough.

    Attributes:
        threshold: Where it stops a token, in the unit of the rule: a number for all cycles, or one for each cycle but
            the last. None among these: nobody stops after this cycle, and no score is computed.
        sign: Turns a threshold into a score: -1 where a low value stops a token.
        reads_zero_mass: Whether `score` looks at the zero-token mass, which is None otherwise.
    """

    threshold: float | Sequence[float | None]
    sign: ClassVar[float] = 1.0
    reads_zero_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = self.threshold
        is_one = not isinstance(given, (list, tuple))
        each = (given,) if is_one else tuple(given)
        # a NaN stops nobody and says nothing
        fits = (isinstance(one, Real) or (one is None and not is_one) for one in each)
        if not each or not all(fits) or any(isinstance(one, float) and isnan(one) for one in each):
            raise ZerodraftError(
                f"threshold={given!r} is neither a number nor one number for each cycle but the last, with None where "
                "nobody stops."
            )
        object.__setattr__(self, "threshold", given if is_one else each)

    def threshold_after(self, cycle: int) -> float | None:
        """The threshold after a cycle, counted from 1.

        Raises:
            ZerodraftError: there are fewer thresholds.
        """
        each = self.threshold
        if not isinstance(each, Sequence):
            return each
        if cycle > len(each):
            raise ZerodraftError(_wrong_count(len(each), f"it is asked after cycle {cycle}"))
        return each[cycle - 1]

    @abstractmethod
    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        """The higher, the sooner a token stops."""

    def __call__(self, out: CycleOutput) -> Bool[Tensor, " n"]:
        threshold = self.threshold_after(out.cycle)
        if threshold is None:
            return torch.zeros(len(out.hidden), dtype=torch.bool, device=out.hidden.device)
        return self.score(out) >= self.sign * threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroMassExit(ScoredRule):
    """Stop where the mass on the zero token reaches `threshold`: the attention adds at most one minus it."""

    pool: HeadPool = "mean"
    layers: LayerChoice = "all"
    reads_zero_mass: ClassVar[bool] = True

    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        """The pooled mass, or minus infinity in a cycle without zero tokens."""
        if out.zero_mass is None:
            return out.hidden.new_full(out.hidden.shape[:1], -torch.inf)
        mass = out.zero_mass
        if self.layers != "all":
            mass = mass[:, :1] if self.layers == "first" else mass[:, -1:]
        mass = mass.flatten(1)
        return {"mean": mass.mean, "max": mass.amax, "min": mass.amin}[self.pool](-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfidenceExit(ScoredRule):
    """Stop where the most probable next token has at least probability `threshold`."""

    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        return out.readout(out.hidden).float().softmax(-1).amax(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyExit(ScoredRule):
    """Stop where the entropy of the next token (in nats) is at most `threshold`."""

    sign: ClassVar[float] = -1.0

    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        log_p = out.readout(out.hidden).float().log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KlExit(ScoredRule):
    """Stop where the prediction has settled: KL(after the cycle || before it), in nats, is at most `threshold`."""

    sign: ClassVar[float] = -1.0

    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        log_p = out.readout(out.hidden).float().log_softmax(-1)
        log_q = out.readout(out.previous).float().log_softmax(-1)
        return -(log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentExit(ScoredRule):
    """Stop where the state has settled: |after - before| / |after| is at most `threshold`."""

    sign: ClassVar[float] = -1.0

    def score(self, out: CycleOutput) -> Float[Tensor, " n"]:
        norm = partial(torch.linalg.vector_norm, dim=-1, dtype=torch.promote_types(out.hidden.dtype, torch.float32))
        return -norm(out.hidden - out.previous) / norm(out.hidden).clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedExit:
    """Stop every token after a fixed number of cycles."""

    cycles: int
    reads_zero_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ZerodraftError(f"No token can stop after {self.cycles} cycles: give 1 or more.")

    def __call__(self, out: CycleOutput) -> Bool[Tensor, " n"]:
        return torch.full(out.hidden.shape[:1], out.cycle >= self.cycles, device=out.hidden.device)


@dataclass(frozen=True, slots=True)
class AtLeast:
    """A rule that is not asked in the first cycles: every token runs at least `cycles`."""

    cycles: int
    rule: ExitRule

    @property
    def reads_zero_mass(self) -> bool:
        """As the rule says."""
        return reads_zero_mass(self.rule)

    def __call__(self, out: CycleOutput) -> Bool[Tensor, " n"]:
        if out.cycle >= self.cycles:
            return self.rule(out)
        return torch.zeros(len(out.hidden), dtype=torch.bool, device=out.hidden.device)


def exit_rule_to_dict(rule: ExitRule) -> dict[str, Any]:
    """A rule as a JSON object: its name and its parameters."""
    name = name_of(type(rule))
    if name is None:
        raise ZerodraftError(f"{type(rule).__name__} is not one of the rules that can be stored: {', '.join(RULES)}.")
    values = asdict(rule)  # pyright: ignore[reportArgumentType]  # all RULES are dataclasses
    return {"rule": name, **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}}


def exit_rule_from_dict(data: dict[str, Any]) -> ExitRule:
    """The rule that `exit_rule_to_dict` wrote.

    Raises:
        ZerodraftError: unknown name or parameters.
    """
    parameters = dict(data)
    name = parameters.pop("rule", None)
    if name not in RULES:
        raise ZerodraftError(f"Exit rule {name!r} is unknown; choose one of {', '.join(RULES)}.")
    try:
        return RULES[name].rule(**parameters)
    except TypeError as error:
        raise ZerodraftError(f"Exit rule {name!r} does not fit its parameters {parameters}: {error}.") from None


def stopping(rule: ExitRule, out: CycleOutput) -> Bool[Tensor, " n"]:
    """The tokens that stop after a cycle.

    Raises:
        ZerodraftError: the rule gave something else than one boolean of each token.
    """
    stops: object = rule(out)
    if isinstance(stops, Tensor) and stops.dtype == torch.bool and stops.shape == out.hidden.shape[:1]:
        return stops
    given = f"a tensor {tuple(stops.shape)} of {stops.dtype}" if isinstance(stops, Tensor) else repr(stops)
    raise ZerodraftError(
        f"The exit rule gave {given} for {len(out.hidden)} tokens: make it return a tensor with one boolean of each."
    )


def check_rule(rule: Any, cycles: int) -> None:
    """Raise `ZerodraftError` for what is no rule, and where a rule has a threshold for each cycle, and not as many as a
    model's cycles want."""
    if rule is not None and (isinstance(rule, type) or not callable(rule)):
        raise ZerodraftError(f"exit_rule={rule!r} is no exit rule: give an object such as LatentExit(threshold=0.3).")
    if isinstance(rule, AtLeast):
        check_rule(rule.rule, cycles)
    if isinstance(rule, ScoredRule) and isinstance(rule.threshold, Sequence) and len(rule.threshold) != cycles - 1:
        raise ZerodraftError(_wrong_count(len(rule.threshold), f"the model's {cycles} cycles want {cycles - 1}"))


def _wrong_count(count: int, why: str) -> str:
    return (
        f"The exit rule has {count} threshold{'s' * (count != 1)}, and {why}: give one number for all cycles, or one "
        "for each cycle but the last."
    )


def check_policy(policy: str) -> None:
    """Raise `ZerodraftError` unless `policy` names one of the two ways in which exited tokens stay attendable."""
    if policy not in get_args(ExitPolicy):
        raise ZerodraftError(f"exit_policy={policy!r} is unknown; choose one of {', '.join(get_args(ExitPolicy))}.")
