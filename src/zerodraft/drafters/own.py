"""A looped model drafts for itself: its first cycles draft, all of its cycles verify.

Any Zero Token Transformer has shallower models inside of it, those that stop after fewer cycles. The number of cycles
is the dial between cheap drafts and good ones. On the lean path the drafted tokens' keys, values and states of these
cycles are used again when they are verified (`fast.lean.draft`); elsewhere the model's own forward pass drafts with a
cache of its own.

Ideas: draft and verify with one model (LayerSkip, arXiv 2404.16710), and of looped models LoopSpec (arXiv 2609.17184).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress, Target
from zerodraft.drafters.autoregressive import AutoregressiveDrafter, choose
from zerodraft.fast.lean import LeanTarget
from zerodraft.ztt.exits import AtLeast, ExitRule, check_rule
from zerodraft.ztt.model import ZttForCausalLM


class SelfDrafter:
    """Drafts with the first cycles of the target itself.

    Args:
        model: The target.
        cycles: How many of its cycles draft; with a rule the fewest.
        rule: Lets a drafted token run more cycles: it stops after the first in which the rule says so.
        candidates: Candidates per position; the first one is on the path.
        max_length: The most positions drafted at once.
        temperature: As for `AutoregressiveDrafter`.
        least: A draft ends where the chance that all of it is right falls below this. None: the share of a pass of the
            target that one more token costs at least.
    """

    taps: Sequence[int] = ()

    def __init__(
        self,
        model: Any,
        *,
        cycles: int = 1,
        rule: ExitRule | None = None,
        candidates: int = 4,
        max_length: int = 8,
        temperature: float = 0.0,
        least: float | None = None,
    ) -> None:
        if not isinstance(model, ZttForCausalLM):
            raise ZerodraftError(
                f"{type(model).__name__} cannot draft for itself: expected a Zero Token Transformer, whose first "
                "cycles do; choose another drafter."
            )
        config = model.config
        if config.schedule != "block" or cycles not in range(1, config.cycles):
            raise ZerodraftError(
                f"The first {cycles!r} of {config.cycles} cycles (schedule {config.schedule!r}) were asked to draft: "
                'expected at least 1, fewer than the model has, and schedule "block".'
            )
        check_rule(rule, config.cycles)
        if least is None:
            drafting = config.stored_layers + (cycles - 1) * config.shared_layers
            least = drafting / (config.stored_layers + (config.cycles - 1) * config.shared_layers)
        self.model, self.cycles, self.max_length = model, cycles, max_length
        self.rule = rule
        self.alone = AutoregressiveDrafter(
            model,
            candidates=candidates,
            max_length=max_length,
            temperature=temperature,
            least=least,
            inputs={"cycles": cycles} if rule is None else {"exit_rule": AtLeast(cycles, rule)},
        )

    def check(self, config: Any) -> None:
        """It drafts for its own model alone."""
        if config is not self.model.config:
            raise ZerodraftError("A model that drafts for itself was given another target; make a SelfDrafter for it.")

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "SelfSession":
        """A session for `batch` rows."""
        return SelfSession(self, batch, device, generator)


class SelfSession:
    """Drafts on the target's own cache where it can be gone on from, else as any small model."""

    def __init__(
        self, drafter: SelfDrafter, batch: int, device: torch.device, generator: torch.Generator | None
    ) -> None:
        self.drafter, self.generator = drafter, generator
        self.target: LeanTarget | None = None
        self.alone = drafter.alone.start(batch, device, generator)
        self.last = [0] * batch

    def join(self, target: Target) -> None:
        """Draft with the target if it is the lean path's."""
        if isinstance(target, LeanTarget) and target.drafts_for(self.drafter.model):
            self.target = target

    def observe(self, progress: Sequence[Progress]) -> None:
        """The target's cache knows the text but for the last token."""
        if self.target is None:
            self.alone.observe(progress)
            return
        for row, news in enumerate(progress):
            if len(news.tokens):
                self.last[row] = int(news.tokens[-1])

    def rewind(self, row: int, length: int) -> None:
        """The target's cache is cut by others, and what comes next has a last token."""
        if self.target is None:
            self.alone.rewind(row, length)

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """Drafts for all rows together, one token after the other; for a single row in one call, if that can be."""
        drafter, target = self.drafter, self.target
        if target is None:
            return self.alone.propose(lengths)
        alone = drafter.alone
        target.begin_draft(drafter.cycles, drafter.rule)
        if len(lengths) == 1 and alone.temperature == 0 and (length := min(lengths[0], drafter.max_length)) > 0:
            found = target.draft_likeliest(
                self.last[0], length, candidates=alone.candidates, least=alone.least, eos=alone.eos_ids
            )
            if found is not None:
                return [Lattice(*found, chain=True)]
        drafted: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in lengths]
        last, going = list(self.last), [length > 0 for length in lengths]
        chances = [0.0] * len(lengths)
        while any(going):
            logits = target.draft(torch.tensor(last, device=target.device)[:, None])
            for row, goes in enumerate(going):
                if not goes:
                    continue
                ids, log_q = choose(logits[row], alone.candidates, alone.temperature, self.generator)
                drafted[row].append((ids, log_q))
                last[row], chances[row] = int(ids[0]), chances[row] + float(log_q[0])
                ends = last[row] in alone.eos_ids or chances[row] < alone.least
                going[row] = not ends and len(drafted[row]) < min(lengths[row], drafter.max_length)
        return [self._lattice(rows) for rows in drafted]

    def _lattice(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> Lattice:
        if not rows:
            return Lattice.empty()
        ids, log_q = (np.stack(part) for part in zip(*rows, strict=True))
        return Lattice(ids, log_q, chain=True, drawn=self.drafter.alone.temperature > 0)
