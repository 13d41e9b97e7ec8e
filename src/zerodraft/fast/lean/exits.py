"""Early exit on the lean decode path: after each cycle a rule says which tokens stop, and the rest is run alone.

What `ztt.cycling.CycleRun.run_exits` does for every family. Keys and values of a stopped token go at once into the
cache of all cycles that it skips: those that its last state gives (`propagate`), or those of its last cycle (`latest`).
The compiled pass does so by itself for rules that are scores of its own (`scores`); other rules, and layers
without kernels, come back here after each cycle.

Legend: B texts, T tokens of each, N = B*T, n tokens that still run, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.compiled import CPU
from zerodraft.fast.lean.cache import LeanCache
from zerodraft.fast.lean.compiled_layers import CompiledExits, CompiledLayers
from zerodraft.fast.lean.passes import Ran, Tokens
from zerodraft.fast.lean.scores import scores_of
from zerodraft.fast.lean.weights import LeanWeights
from zerodraft.fast.lean.ztt import Stages
from zerodraft.ztt.exits import CycleOutput, ExitPolicy, ExitRule, check_rule, reads_zero_mass, stopping


class EarlyExit:
    """A rule over a model's packed weights, asked within the `compiled` pass where that can be, else here."""

    def __init__(self, weights: LeanWeights, rule: ExitRule, policy: ExitPolicy) -> None:
        assert weights.stages is not None
        check_rule(rule, weights.stages.cycles)
        self._weights, self._stages, self._rule = weights, weights.stages, rule
        self._policy: ExitPolicy = policy
        self.compiled: CompiledExits | None = None
        scores, layers = scores_of(rule, weights.stages), weights.run
        if scores is not None and isinstance(layers, CompiledLayers):
            self.compiled = CompiledExits(layers, weights.stages, scores, policy)

    def run(
        self,
        x: Float[Tensor, "N H"],
        kv: Float[Tensor, "E B nk2 S D"],
        tokens: Tokens,
        *,
        head_output: Float[Tensor, "N H"] | None,
        real: Bool[Tensor, " N"] | None,
        taps: Sequence[int],
        last_only: bool,
        note: tuple[int, Float[Tensor, "N H"]] | None = None,
    ) -> tuple[Ran, Int[Tensor, " N"]]:
        """All layers with early exit; what they brought, and the cycles of each token (0: padding).

        Args:
            x: The embeddings.
            kv: The cache.
            tokens: Whose.
            head_output: As in `Layers.run`.
            real: False for padding, which runs the first cycle and leaves without being asked; None: there is none.
            taps: As in `Layers.run`, in front of the cycles or behind them.
            last_only: As there.
            note: A cycle that all tokens run, before the last one, and where the states behind it are put.
        """
        _check_taps(taps, self._stages)
        how: dict[str, Any] = {"head_output": head_output, "taps": taps}
        if self.compiled is not None:
            return self.compiled.run(x, kv, tokens, real=real, last_only=last_only, note=note, **how)
        stages, run = self._stages, self._weights.run.run
        x, before, _ = run(x, kv, tokens, stages.head, **how)
        runs = _Runs(x, tokens, kv.shape[1], head_output)
        depth = self._run_cycles(runs, kv, real, note)
        x, behind, _ = run(runs.all(), kv, tokens, stages.tail, last_only=last_only, **how)
        return Ran(x, before | behind, []), depth

    def _run_cycles(
        self, runs: "_Runs", kv: Tensor, real: Tensor | None, note: tuple[int, Tensor] | None
    ) -> Int[Tensor, " N"]:
        """All cycles, the rule asked after each but the last; how many of them each token ran."""
        stages, layers = self._stages, self._weights.run
        depth = torch.ones(len(runs.x), dtype=torch.int64, device=CPU) if real is None else real.long()
        for cycle in range(1, stages.cycles + 1):
            last, source = cycle == stages.cycles, stages.cycle(cycle)
            # what a rule was shown stays as it was
            entered, fed = runs.x, runs.head_output
            wanted = not last and reads_zero_mass(self._rule)
            ran = layers.run(entered.clone(), kv, runs.tokens, source, head_output=fed, masses=wanted)
            runs.x = ran.x
            if note is not None and note[0] == cycle:
                note[1].copy_(runs.x)
            if last:
                break
            mass = torch.stack(ran.masses, 1) if ran.masses else None
            out = CycleOutput(cycle, runs.x, entered, mass, self._weights.logits)
            stops = stopping(self._rule, out) if real is None or cycle > 1 else self._stops_first(out, real)
            count = int(stops.sum())
            if count:
                states, gone = runs.leave(None if count == len(stops) else stops)
                if self._policy == "propagate":
                    source = stages.cycle(cycle + 1)
                    layers.keep(states, kv, gone, source)
                copy_on(kv, gone, source, stages.tail.start)
                if count == len(stops):
                    break
            depth[runs.rows] = cycle + 1
        return depth

    def _stops_first(self, out: CycleOutput, real: Bool[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Who stops after the first cycle: padding, which the rule is not shown, and what the rule says."""
        mass = None if out.zero_mass is None else out.zero_mass[real]
        stops = ~real
        shown = CycleOutput(out.cycle, out.hidden[real], out.previous[real], mass, out.readout)
        stops[real] = stopping(self._rule, shown)
        return stops


def _check_taps(taps: Sequence[int], stages: Stages) -> None:
    if inside := [tap for tap in taps if stages.head.stop < tap <= stages.tail.start]:
        raise ZerodraftError(
            f"The drafter reads the target's hidden states {inside}, within the cycles, which tokens leave with "
            "exit_rule; choose a drafter that reads none of them, or leave out exit_rule."
        )


class Depths:
    """The cycles that cached tokens took, in the columns of `generate`; `last` are those of the last call (B, T)."""

    last: Int[Tensor, "B T"]

    def __init__(self) -> None:
        # numpy: torch takes ten times as long to set some numbers
        self._kept = np.zeros((0, 0), np.int64)

    def keep(self, kept: Sequence[Sequence[int]], cache: LeanCache) -> Int[Tensor, "B C"]:
        """Keep those of tokens that the cache has just kept; all."""
        rows, width, known = len(kept), cache.width(), self._kept.shape[1]
        last = self.last.numpy()
        if known < width:
            more = np.zeros((rows, max(width, 2 * known) - known), np.int64)
            self._kept = np.concatenate([self._kept, more], 1) if known else more
        if rows == 1 and cache.gaps is None:
            nodes = kept[0]
            self._kept[0, width - len(nodes) : width] = last[0] if len(nodes) == last.shape[1] else last[0, nodes]
            # what one row's columns hold stays as it is
            return torch.from_numpy(self._kept[:, :width])
        of = [row for row, nodes in enumerate(kept) for _ in nodes]
        columns = [column for row, nodes in enumerate(kept) for column in cache.newest(row, len(nodes))]
        self._kept[of, columns] = last[of, [node for nodes in kept for node in nodes]]
        return torch.from_numpy(self._kept[:, :width].copy())


class _Runs:
    """The tokens that still run: their states, and which of all they are. The last states of all are kept.

    **Fields:** `x` (n, H), `tokens` and `head_output` are those of the running ones, `rows` their places among all.
    """

    def __init__(self, x: Tensor, tokens: Tokens, texts: int, head_output: Tensor | None) -> None:
        self.x, self.tokens, self.head_output = x, tokens, head_output
        self.rows: Tensor | slice = slice(None)
        self._all, self._tokens, self._fed, self._texts = x, tokens, head_output, texts

    def all(self) -> Float[Tensor, "N H"]:
        """The last states of all tokens."""
        if isinstance(self.rows, slice):
            self._all = self.x.clone()
        else:
            self._all[self.rows] = self.x
        return self._all

    def leave(self, stops: Bool[Tensor, " n"] | None) -> tuple[Tensor, Tokens]:
        """Some of those that run leave, or all (None); their states and places."""
        x, tokens = self.x, self.tokens
        if stops is None:
            return x, tokens
        states, first = self.all(), self._tokens
        each = len(states) // self._texts
        rows = torch.arange(len(states), device=CPU)
        places, texts = first.past + rows % each, rows // each if self._texts > 1 else None
        here = rows[self.rows]
        self.rows = here[~stops]
        self.tokens, self.x = first.pick(self.rows, places, texts), states[self.rows]
        self.head_output = None if self._fed is None else self._fed[self.rows]
        return x[stops], first.pick(here[stops], places, texts)


def copy_on(kv: Tensor, tokens: Tokens, source: range, end: int) -> None:
    """The keys and values that tokens have in a cycle are theirs in all later cycles, those before execution `end`."""
    cycles = kv[source.start : end].unflatten(0, (-1, len(source)))
    if tokens.places is None:
        cycles[1:, ..., tokens.past : tokens.seen, :] = cycles[:1, ..., tokens.past : tokens.seen, :]
    else:
        texts = torch.zeros_like(tokens.places) if tokens.texts is None else tokens.texts
        cycles[1:, :, texts, :, tokens.places] = cycles[0][:, texts, :, tokens.places][:, None]
