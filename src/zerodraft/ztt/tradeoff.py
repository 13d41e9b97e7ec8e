"""What early exit costs and saves on a text: compute and loss, measured with the exits really applied.

One forward pass over a block of tokens gives every position the same depth and state that it has when the text is
generated token by token (the exit of a token depends on earlier tokens only), so the loss and the FLOPs of whole blocks
are those of generation, at the speed of prefill.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.exits import CycleOutput, ExitPolicy, ExitRule, FixedExit, ScoredRule, exit_rule_to_dict
from zerodraft.ztt.flops import count_flops
from zerodraft.ztt.model import ZttForCausalLM
from zerodraft.ztt.rules import RULES, name_of, scored_names
from zerodraft.ztt.thresholds import Outcomes

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Thresholds are placed so that this share of all scores (of every token after every cycle but the last) would stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measurement over a text.

    Attributes:
        rule: The rule as `exit_rule_to_dict` writes it, or None without exits.
        mean_cycles: Cycles per token.
        depths: Share of the tokens that stopped after 1, 2, ... cycles.
        flops_per_token: Counted, with everything that the rule itself computes.
        flops: The same as a share of the FLOPs without exits.
        loss: Mean cross-entropy of the next token, in nats.
        loss_increase: Difference to the loss without exits.
    """

    rule: dict[str, Any] | None
    mean_cycles: float
    depths: tuple[float, ...]
    flops_per_token: float
    flops: float
    loss: float
    loss_increase: float

    @property
    def relative_increase(self) -> float:
        """Increase of the loss as a share of the loss without exits."""
        return self.loss_increase / (self.loss - self.loss_increase)


class Ruler:
    """Measures a model with different rules on one text.

    Args:
        model: Is put into evaluation mode for each measurement.
        blocks: Token ids; each row is read on its own.
        policy: What deeper cycles see of exited tokens.
        batch_size: Rows per forward pass.
        on_batch: Called after each forward pass.

    Raises:
        ZerodraftError: blocks of fewer than two tokens, or a model whose tokens all run the same cycles anyway, or to
            no effect.
    """

    def __init__(
        self,
        model: ZttForCausalLM,
        blocks: Int[Tensor, "rows t"],
        policy: ExitPolicy = "propagate",
        batch_size: int = 8,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        rows, length = blocks.shape
        if rows == 0 or length < 2:
            raise ZerodraftError(f"Calibration needs at least one block of two tokens, got {rows} of {length}.")
        if model.config.cycles < 2:
            raise ZerodraftError("The model has one cycle, so no token can leave early; it needs cycles of at least 2.")
        if model.config.schedule != "block":
            raise ZerodraftError('Early exit needs schedule="block": with "layer" a cycle has no end before the tail.')
        if _changes_nothing(model):
            raise ZerodraftError(
                "All gates of the model are closed, as conversion leaves them, so every depth gives the same text and "
                "there is no exit to choose yet: train it first (zerodraft finetune --model MODEL --data FILE --output "
                "DIR)."
            )
        self.model, self.blocks, self.batch_size, self.on_batch = model, blocks, batch_size, on_batch
        self.policy: ExitPolicy = policy
        self._full: Point | None = None
        self._losses: dict[str, Tensor] = {}
        self._collected: dict[ScoredRule, tuple[int, Tensor]] = {}

    @property
    def passes(self) -> int:
        """Forward passes of one measurement."""
        return -(-len(self.blocks) // self.batch_size)

    @property
    def full(self) -> Point:
        """The model without exits."""
        if self._full is None:
            self._full = self._measure(None)
        return self._full

    def measure(self, rule: ExitRule) -> Point:
        """The model with a rule."""
        full, point = self.full, self._measure(rule)
        share, increase = point.flops_per_token / full.flops_per_token, point.loss - full.loss
        return replace(point, flops=share, loss_increase=increase)

    def losses(self, point: Point) -> Float[Tensor, " rows"]:
        """The loss of each block at a point that this ruler has measured."""
        return self._losses[json.dumps(point.rule)].mean(1)

    def scores(self, rule: ScoredRule) -> Float[Tensor, " n"]:
        """The scores of every token after every cycle but the last, in ascending order, when nobody stops.

        Raises:
            ZerodraftError: the rule has nothing to look at, or a score is not a number.
        """
        scores = self._collect(rule)[1].flatten()
        return scores[scores.isfinite()].sort().values

    def outcomes(self, rule: ScoredRule, fixed: Sequence[Point]) -> Outcomes:
        """What every token that predicts another would bring after each cycle, in shares of the FLOPs without exits.

        Args:
            rule: Scores the tokens; nobody stops.
            fixed: The fixed depths, 1 to all cycles, measured with this ruler.

        Raises:
            ZerodraftError: as in `scores`.
        """
        flops, scores = self._collect(rule)
        asking = flops / (self.blocks.numel() * self.full.flops_per_token) - 1
        return Outcomes(
            scores=scores[:, :-1].flatten(0, 1).double(),
            losses=torch.stack([self._losses[json.dumps(point.rule)].flatten() for point in fixed], 1),
            costs=torch.tensor([point.flops for point in fixed], dtype=torch.float64),
            asking=asking / scores.shape[-1],
        )

    def _collect(self, rule: ScoredRule) -> tuple[int, Float[Tensor, "rows t asked"]]:
        """FLOPs, and the scores after every cycle but the last, of a pass in which nobody stops."""
        if rule not in self._collected:
            collector = _Collector(rule)
            flops = self._forward(collector)[0]
            asked = self.model.config.cycles - 1
            each = [torch.stack(collector.scores[at : at + asked], 1) for at in range(0, len(collector.scores), asked)]
            scores = torch.cat(each).unflatten(0, self.blocks.shape)
            if bool(scores.isnan().any()):
                raise ZerodraftError(
                    f"Scores of {type(rule).__name__} are not numbers: do the model's weights hold NaN?"
                )
            if not bool(scores.isfinite().any()):
                raise ZerodraftError(
                    "The model has no zero tokens in the cycles after which a token could leave; choose another rule "
                    "than zero-mass, such as latent."
                )
            self._collected[rule] = flops, scores
        return self._collected[rule]

    @torch.no_grad()
    def _forward(self, rule: ExitRule | None) -> tuple[int, Float[Tensor, "rows predicted"], list[Tensor]]:
        """FLOPs, losses, and depths of one pass over the text."""
        was_training = self.model.training
        self.model.eval()
        flops, losses, depths = 0, [], []
        try:
            for batch in self.blocks.split(self.batch_size):
                batch = batch.to(self.model.device)
                with count_flops() as counted:
                    out = self.model(batch, use_cache=False, exit_rule=rule, exit_policy=self.policy)
                flops += counted.total
                each = F.cross_entropy(out.logits[:, :-1].transpose(1, 2).float(), batch[:, 1:], reduction="none")
                losses.append(each.double().cpu())
                if out.exit_depth is not None:
                    depths.append(out.exit_depth.cpu())
                self.on_batch()
        finally:
            self.model.train(was_training)
        return flops, torch.cat(losses), depths

    def _measure(self, rule: ExitRule | None) -> Point:
        cycles = self.model.config.cycles
        flops, losses, parts = self._forward(rule)
        stored = None if rule is None else exit_rule_to_dict(rule)
        self._losses[json.dumps(stored)] = losses
        depths = torch.cat(parts) if parts else torch.full(self.blocks.shape, cycles)
        counts = torch.bincount(depths.flatten(), minlength=cycles + 1)[1:]
        return Point(
            rule=stored,
            mean_cycles=depths.cpu().double().mean().item(),
            depths=tuple((counts / depths.numel()).tolist()),
            flops_per_token=flops / self.blocks.numel(),
            flops=1.0,
            loss=losses.mean().item(),
            loss_increase=0.0,
        )


def _changes_nothing(model: ZttForCausalLM) -> bool:
    """Whether the cycles after the first are the identity, as conversion leaves them."""
    if model.cycle_gates is None or bool(model.cycle_gates().any()):
        return False
    if model.residual_streams is not None and not model.residual_streams.is_plain:
        return False
    fed_again = model.input_injection is not None and bool(model.input_injection().any())
    return not fed_again and (model.cycle_scales is None or bool((model.cycle_scales()[1:] == 1).all()))


class _Collector:
    """A rule that notes the scores of another one and stops nobody."""

    def __init__(self, rule: ScoredRule) -> None:
        self.rule = rule
        self.scores: list[Tensor] = []

    def __call__(self, out: CycleOutput) -> Bool[Tensor, " n"]:
        score = self.rule.score(out).float()
        self.scores.append(score.cpu())
        return torch.zeros_like(score, dtype=torch.bool)


def scored_rule(rule: str | ExitRule) -> ScoredRule:
    """A rule that has a threshold to be found: by name with its default options, or itself.

    Raises:
        ZerodraftError: unknown, or without a threshold.
    """
    known = scored_names()
    made = RULES[rule].rule(threshold=0.0) if isinstance(rule, str) and rule in known else rule
    if not isinstance(made, ScoredRule) or name_of(type(made)) is None:
        raise ZerodraftError(f"{rule!r} is not an exit rule with a threshold; choose one of {', '.join(known)}.")
    return made


def at_level(rule: ScoredRule, scores: Float[Tensor, " n"], level: float) -> ScoredRule:
    """The rule with the threshold that a share `level` of the (ascending) scores reaches."""
    index = min(int((1 - level) * len(scores)), len(scores) - 1)
    return replace(rule, threshold=rule.sign * float(scores[index]))


def fixed_depths(ruler: Ruler) -> list[Point]:
    """The model with the same depth for all tokens, 1 to all cycles."""
    return [ruler.measure(FixedExit(cycles=cycles)) for cycles in range(1, ruler.model.config.cycles + 1)]


def trade_off(ruler: Ruler, place: Callable[[float], ScoredRule], at: Sequence[float] = LEVELS) -> dict[float, Point]:
    """A rule measured from rare to frequent exits, by level or price.

    Args:
        ruler: Measures.
        place: The rule at a level or price, see `placing`.
        at: Levels or prices.
    """
    points: dict[float, Point] = {}
    for value in sorted(at):
        candidate = place(value)
        same = next((p for p in points.values() if p.rule == exit_rule_to_dict(candidate)), None)
        points[value] = same or ruler.measure(candidate)
    return points
