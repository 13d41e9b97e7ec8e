"""How likely texts are after others, and what it costs to find out; no task, and no lm-evaluation-harness.

The sums are those of lm-evaluation-harness (tested), from whole forward passes. A Zero Token Transformer reads with an
exit rule as it would write with it, since the exit of a token depends on the tokens before it alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.exits import ExitRule
from zerodraft.ztt.flops import count_flops


class Answer(NamedTuple):
    """How likely a text is after another.

    Attributes:
        log_p: Sum over its tokens, in nats.
        is_greedy: Whether each of its tokens is the most likely one.
    """

    log_p: float
    is_greedy: bool


@dataclass(kw_only=True, slots=True)
class Cost:
    """What forward passes have taken.

    Attributes:
        flops: Floating-point operations that were executed, with those of the rule and of padding.
        positions: Tokens and padding that were read.
        tokens: Tokens alone.
        cycles: Cycles that these ran, in sum; 0 without an exit rule.
    """

    flops: int = 0
    positions: int = 0
    tokens: int = 0
    cycles: int = 0

    def to_dict(self) -> dict[str, float]:
        """FLOPs for each position and, with an exit rule, cycles of each token."""
        means = {"flops_per_token": self.flops / self.positions} if self.positions else {}
        return means | ({"mean_depth": self.cycles / self.tokens} if self.cycles else {})


@dataclass(kw_only=True, slots=True)
class Reader:
    """Reads texts with a model.

    Args:
        model: A causal language model in evaluation mode.
        batch_size: Texts in a forward pass.
        rule: Exit rule of a Zero Token Transformer.
        max_length: Tokens that the model can read; longer texts lose their beginning. None: no limit.

    Attributes:
        cost: Of all that was read since it was last replaced.
    """

    model: Any
    batch_size: int = 8
    rule: ExitRule | None = None
    max_length: int | None = None
    cost: Cost = field(default_factory=Cost)

    def answers(
        self, pairs: Sequence[tuple[list[int], list[int]]], on_batch: Callable[[int], object] = lambda answers: None
    ) -> list[Answer]:
        """How likely the second tokens of each pair are after the first.

        Args:
            pairs: Token ids, at least one on each side.
            on_batch: Called after each forward pass with the number of answers that it gave.

        Raises:
            ZerodraftError: more tokens to be guessed than the model can read.
        """
        # answers of one token to the same question are all read off one row
        texts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (before, after) in enumerate(pairs):
            if self.max_length is not None and len(after) > self.max_length:
                raise ZerodraftError(
                    f"An answer has {len(after)} tokens and at most {self.max_length} are read at once: raise "
                    "--max-length (max_length) if the model can read more."
                )
            first = 0 if self.max_length is None else -self.max_length - 1
            texts[(*before, *after)[first:-1]].append(index)
        rows = sorted(texts, key=len, reverse=True)
        found: dict[int, Answer] = {}
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            for row, logits in zip(batch, self._read(batch), strict=True):
                for index in texts[row]:
                    after = torch.tensor(pairs[index][1], device=logits.device)
                    found[index] = answer(logits[len(row) - len(after) : len(row)], after)
            on_batch(sum(len(texts[row]) for row in batch))
        return [found[index] for index in range(len(pairs))]

    @torch.no_grad()
    def _read(self, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "b t v"]:
        """Logits of texts, the longest first."""
        # what follows the last token of a text changes nothing before it
        ids = torch.tensor([row + (0,) * (len(rows[0]) - len(row)) for row in rows], device=self.model.device)
        options = {} if self.rule is None else {"exit_rule": self.rule}
        with count_flops() as counted:
            out = self.model(ids, use_cache=False, **options)
        self.cost.flops += counted.total
        self.cost.positions += ids.numel()
        self.cost.tokens += sum(map(len, rows))
        if self.rule is not None:
            self.cost.cycles += sum(int(out.exit_depth[i, : len(row)].sum()) for i, row in enumerate(rows))
        return out.logits


def answer(logits: Float[Tensor, "t v"], tokens: Int[Tensor, " t"]) -> Answer:
    """From the logits before each token."""
    log_p = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).sum()
    return Answer(float(log_p), bool((logits.argmax(-1) == tokens).all()))
