"""The heart of the Zero Token Transformer: run head, N cycles of the shared layers, and tail.

The family's own forward pass drives: it embeds, makes masks and rotary positions, and walks over its decoder layers.
That walk meets a `CycledLayers`, which in the middle of a forward pass hands out recorders instead of layers. They
note with what arguments each stored layer would be called; the last one has seen them all and runs the schedule, every
execution with its own KV slot and zero token. So final norm, LM head, score caps and multipliers stay the family's own.

Head-tail decoupled cycling: Li et al., 2025/2026. Early exit: exited tokens stay attendable in the deeper cycles, with
keys and values from their frozen state (`propagate`) or from their last cycle (`latest`); the rest is compacted to the
tokens that still run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.cache import KvMemory, KvProbe, KvReady, SlotView
from zerodraft.ztt.config import Plan, Step
from zerodraft.ztt.exits import (
    CycleOutput,
    ExitPolicy,
    ExitRule,
    check_policy,
    check_rule,
    reads_zero_mass,
    stopping,
)
from zerodraft.ztt.families import DecoderParts, makes_masks
from zerodraft.ztt.interface import LayerCall, Once, TokenGrid, current
from zerodraft.ztt.running import Running
from zerodraft.ztt.streams import StreamStates

# Layer arguments that have one entry per token and follow the tokens of a compacted step.
_PER_TOKEN = ("position_embeddings", "position_ids", "per_layer_input")


class CycledLayers(nn.ModuleList):
    """The stored decoder layers of a family's model. Outside a forward pass a plain `ModuleList`."""

    @property
    def stored(self) -> list[nn.Module]:
        """The layers themselves, also during a forward pass."""
        return [layer for layer in self._modules.values() if layer is not None]

    def _walk(self) -> list[Any]:
        run = current.run
        return self.stored if run is None else [partial(run.record, i) for i in range(len(self))]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._walk())

    def __getitem__(self, index: int | slice) -> Any:
        return self._walk()[index]


class Recorder:
    """What `CycledLayers` hands its layers' calls to during a forward pass.

    Attributes:
        causal_only: Whether the caller of the forward pass gave nothing that could mask more than causality does.
    """

    causal_only: bool = False

    def record(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def drives(self) -> Iterator[None]:
        """Within this context the walk over the layers goes to this object."""
        outer, current.run = current.run, self
        try:
            yield
        finally:
            current.run, current.call = outer, None


class Readout(Recorder):
    """Stands in for all layers with given states, so that only the family's final norm and LM head run."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def record(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class CycleOptions:
    """What the caller of a forward pass asks of the cycles.

    Args:
        cycles: Cycles to run for every token; None for all that the model has.
        every_cycle: Run the tail after each cycle too, for the losses over cycles.
        keep_mass: Collect the zero-token mass of the shared layers.
        depth: `(b, t)`, cycles of each token (from 1): run everything and select. The oracle, and for training.
        rule: Early exit, decided after each cycle.
        policy: What deeper cycles see of an exited token.
    """

    cycles: int | None = None
    every_cycle: bool = False
    keep_mass: bool = False
    depth: Tensor | None = None
    rule: ExitRule | None = None
    policy: ExitPolicy = "propagate"

    def check(self, plan: Plan) -> None:
        """Raise `ZerodraftError` for options that exclude each other or that the model cannot follow."""
        if self.cycles is not None and not 1 <= self.cycles <= plan.cycles:
            raise ZerodraftError(f"cycles={self.cycles} must lie between 1 and the model's {plan.cycles}.")
        check_policy(self.policy)
        check_rule(self.rule, plan.cycles)
        chosen = (self.rule is not None, self.depth is not None, self.every_cycle)
        if sum(chosen) > 1:
            raise ZerodraftError("Give only one of exit_rule, exit_depth and cycle_weights.")
        if any(chosen[:2]) and plan.schedule != "block":
            raise ZerodraftError('Early exit needs schedule="block": with "layer" a cycle has no end before the tail.')


@dataclass(kw_only=True)
class CycleRun(Recorder):
    """One forward pass.

    Args:
        options: What the caller asks of it.
        plan: The schedule.
        layers: The family's layers.
        parts: How they are called.
        zero_keys: Keys of the zero tokens by step.
        gates: `(cycles - 1, shared layers)` of `cycle_gates`, or None.
        injection: `(cycles - 1,)` of `input_injection`, or None.
        scales: `(cycles,)` of `cycle_scales`, or None.
        streams: Those of `residual_streams`, or None.
        rotary: The family's rotary module, or None.
        cache: Cache of the unrolled model, or None.
        cycles: Cycles to run for every token.
        real: `(b, t)` bool, False for padding, or None.
        causal_only: See `Recorder`.
        readout: Logits of states, for rules that want them.
    """

    options: CycleOptions
    plan: Plan
    layers: list[nn.Module]
    parts: DecoderParts
    zero_keys: dict[Step, Tensor]
    gates: Tensor | None
    injection: Tensor | None
    scales: Tensor | None
    streams: StreamStates | None
    rotary: nn.Module | None
    cache: Cache | None
    cycles: int
    real: Tensor | None
    causal_only: bool
    readout: Callable[[Tensor], Tensor]

    inputs: list[dict[str, Any]] = field(default_factory=list)
    attention_masks: Once = field(init=False)
    masses: list[Tensor | None] = field(default_factory=list)
    shallower: list[Tensor] = field(default_factory=list)
    exit_depth: Tensor | None = None
    shape: torch.Size | None = None
    head_output: Tensor | None = None

    def __post_init__(self) -> None:
        self.attention_masks = Once()  # no default_factory, which torch.compile cannot trace

    def record(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.update(zip(self.parts.arguments, args, strict=False))
        kwargs.pop(self.parts.cache_argument, None)
        self.inputs.append(kwargs)
        self.shape = hidden.shape if layer == 0 else self.shape
        if hidden.shape != self.shape:
            raise ZerodraftError(
                f"The model of {type(self.layers[0]).__name__} takes apart what its layers return, so this family "
                "cannot be cycled."
            )
        return self.execute(hidden) if len(self.inputs) == self.plan.stored_layers else hidden

    # -- schedules ------------------------------------------------------------------------------------------------

    def execute(self, hidden: Tensor) -> Tensor:
        """Head, cycles and tail over the hidden states `(b, t, d)` that the family's embedding made."""
        if hidden.ndim != 3 and (self.options.rule is not None or self.options.every_cycle):
            raise ZerodraftError(
                f"{type(self.layers[0]).__name__} passes on more than one state for each token, which early exit and "
                "losses over cycles do not support; leave out exit_rule and cycle_weights."
            )
        if self.options.rule is not None and makes_masks(self.layers[0]):
            raise ZerodraftError(
                f"{type(self.layers[0]).__name__} makes its attention masks from all tokens, so it cannot run on those "
                "alone that go on: it has no early exit; leave out exit_rule."
            )
        shared = [step for step in self.plan.shared if step.cycle < self.cycles]
        for step in self.plan.head:
            hidden = self.run_layer(step, hidden)
        self.head_output = hidden
        if self.options.every_cycle:
            return self.run_every_cycle(shared, hidden)
        hidden = (self.run_all if self.options.rule is None else self.run_exits)(shared, hidden)
        for step in self.plan.tail:
            hidden = self.run_layer(step, hidden)
        return hidden

    def run_all(self, shared: list[Step], hidden: Tensor) -> Tensor:
        """Every token through every cycle, or selected by `depth`."""
        memory = KvMemory() if self.options.depth is not None and self.options.policy == "latest" else None
        for step in shared:
            running = None if self.options.depth is None or step.cycle == 0 else step.cycle < self.options.depth
            hidden = self.feed(step, hidden, running=running)
            view = SlotView(self.cache, step.slot, memory, running=running)
            out = self.run_layer(step, hidden, view if memory or self.cache is not None else None)
            hidden = out if running is None else torch.where(running[..., None], out, hidden)
        return hidden

    def run_every_cycle(self, shared: list[Step], hidden: Tensor) -> Tensor:
        """The states after the tail for the full number of cycles; those for fewer are kept in `shallower`."""
        state, result = hidden, hidden
        for cycle in range(self.cycles):
            if self.plan.schedule == "block":
                state = self.run_all([step for step in shared if step.cycle == cycle], state)
            else:
                # A layer's later cycles come before the next layer: every number of cycles is a pass of its own.
                self.masses.clear()
                state = self.run_all([step for step in shared if step.cycle <= cycle], hidden)
            result = state
            for step in self.plan.tail:
                result = self.run_layer(step, result)
            if cycle + 1 < self.cycles:
                self.shallower.append(result)
        return result

    def run_exits(self, shared: list[Step], hidden: Tensor) -> Tensor:
        """Cycles over the tokens that the rule lets run, in one row without the exited ones."""
        cycles = [[step for step in shared if step.cycle == cycle] for cycle in range(self.cycles)]
        rule = self.options.rule
        assert rule is not None
        memory, tokens = KvMemory(), Running.start(hidden, self.real)
        for cycle, steps in enumerate(cycles, 1):
            before, masses = tokens.states, [] if reads_zero_mass(rule) else None
            for step in steps:
                view = SlotView(self.cache, step.slot, memory, tokens.grid)
                states = self.feed(step, tokens.states, tokens.grid)
                tokens.states = self.run_layer(step, states, view, tokens.grid, masses)
            if cycle == self.cycles:
                break
            asked = tokens.asked()
            stops = self.ask(cycle, before, tokens.states, masses, only=None if asked is tokens.grid else asked)
            count = int(stops.sum())
            if count == 0 and asked is tokens.grid:
                tokens.go_on(cycle + 1)
            elif count == len(stops):
                tokens.stop_all()
                self.leave(memory, cycles[cycle:], tokens, asked)
                break
            else:
                stopped = tokens.stop(asked, stops)
                tokens.go_on(cycle + 1)
                if self.options.policy == "propagate" and not self.plan.cycle_lora:
                    self.freeze(memory, cycles[cycle], tokens.hidden, stopped)
            self.freeze_gone(memory, cycles[cycle], tokens)
        self.exit_depth = tokens.depth.view(hidden.shape[:2])
        return tokens.lay_out()

    def ask(
        self, cycle: int, before: Tensor, states: Tensor, masses: list[Tensor] | None, only: TokenGrid | None
    ) -> Tensor:
        """The rule's answer for every token of `states`, or for those of `only`."""
        assert self.options.rule is not None
        after, before = states.flatten(0, 1), before.flatten(0, 1)
        mass = torch.stack([m.flatten(0, 1) for m in masses], 1) if masses else None
        if only is not None:
            after, before = after[only.index], before[only.index]
            mass = None if mass is None else mass[only.index]
        return stopping(self.options.rule, CycleOutput(cycle, after, before, mass, self.readout))

    def leave(self, memory: KvMemory, cycles: list[list[Step]], tokens: Running, stopped: TokenGrid | None) -> None:
        """Nobody runs any more, but later tokens will attend to the slots of the remaining cycles."""
        if self.options.policy == "propagate" and not self.plan.cycle_lora:
            self.freeze(memory, cycles[0], tokens.hidden, stopped)
        for steps in cycles:
            self.freeze_gone(memory, steps, tokens)
            if self.cache is not None:
                for step in steps:
                    self.cache.update(*memory[step.layer], step.slot)

    def freeze_gone(self, memory: KvMemory, steps: list[Step], tokens: Running) -> None:
        """With per-cycle LoRA a frozen state has other keys and values in every cycle: make those of a cycle's `steps`
        for all tokens that left before it. Without, those of the cycle after its exit hold for all later ones."""
        if self.options.policy == "propagate" and self.plan.cycle_lora:
            left = (tokens.depth > 0) & (tokens.depth <= steps[0].cycle)
            self.freeze(memory, steps, tokens.hidden, tokens.at(left.nonzero()[:, 0]))

    def freeze(self, memory: KvMemory, steps: list[Step], hidden: Tensor, grid: TokenGrid | None) -> None:
        """Put the keys and values that the frozen states of exited tokens give in each shared layer in place."""
        if grid is not None and not grid.index.numel():
            return
        states = hidden if grid is None else grid.pack(hidden)
        for step in steps:
            try:
                call = LayerCall(cycle=step.cycle, need_mass=False)
                kwargs = self.layer_inputs(step, grid) | {self.parts.cache_argument: KvProbe()}
                self.layers[step.layer](states, layer_call=call, **kwargs)
            except KvReady as ready:
                memory.merge(step.layer, *ready.states, grid)

    # -- one layer ------------------------------------------------------------------------------------------------

    def feed(self, step: Step, hidden: Tensor, grid: TokenGrid | None = None, running: Tensor | None = None) -> Tensor:
        """What a step is fed with: where a further cycle begins, a mixture of the streams, and the head's output again.
        Tokens that have left keep their states."""
        if step.layer != self.plan.head_layers or (self.streams is None and self.injection is None):
            return hidden
        fed = hidden if self.streams is None else self.streams.feed(step.cycle, hidden, grid)
        if self.injection is not None and step.cycle > 0:
            assert self.head_output is not None
            again = self.head_output if grid is None else grid.pack(self.head_output)
            fed = fed + self.injection[step.cycle - 1].to(hidden.dtype) * again
        return fed if running is None else torch.where(running[..., None], fed, hidden)

    def run_layer(
        self,
        step: Step,
        hidden: Tensor,
        view: SlotView | None = None,
        grid: TokenGrid | None = None,
        masses: list[Tensor] | None = None,
    ) -> Tensor:
        """One execution of a stored layer, with its slot, zero token and gate, and at a cycle's end the scale."""
        layer, place = self.layers[step.layer], step.layer - self.plan.head_layers
        if view is None and self.cache is not None:
            view = SlotView(self.cache, step.slot)
        is_shared = 0 <= place < self.plan.shared_layers
        wants_mass = is_shared and (self.options.keep_mass or masses is not None)
        call = LayerCall(
            cycle=step.cycle,
            key=self.zero_key(step, hidden),
            grid=grid,
            need_mass=wants_mass or self.plan.ffn_gate,
            masks=self.attention_masks,
        )
        kwargs = self.layer_inputs(step, grid) | {self.parts.cache_argument: view}
        out = layer(hidden, layer_call=call, **kwargs)
        if not isinstance(out, Tensor) or not call.attended:
            raise ZerodraftError(
                f"{type(layer).__name__} did not hand its keyword arguments to the attention function or returned no "
                "tensor; this family cannot be cycled."
            )
        if is_shared and self.options.keep_mass:
            self.masses.append(call.mass)
        if masses is not None and call.mass is not None:
            masses.append(call.mass)
        if self.gates is not None and is_shared and step.cycle > 0:
            gate = self.gates[step.cycle - 1, place]
            out = hidden + gate.to(hidden.dtype) * (out - hidden)
        if self.scales is not None and place == self.plan.shared_layers - 1:
            out = self.scales[step.cycle].to(out.dtype) * out
        return out

    def layer_inputs(self, step: Step, grid: TokenGrid | None) -> dict[str, Any]:
        """The recorded arguments of a stored layer, those of each token cut down to the tokens of `grid`."""
        kwargs = self.inputs[step.layer]
        if grid is None:
            return kwargs
        for name in self.parts.arguments:
            if isinstance(kwargs.get(name), Tensor) and name not in (*_PER_TOKEN, "attention_mask"):
                raise ZerodraftError(
                    f"{type(self.layers[step.layer]).__name__} is handed {name}, and it is not known which part of it "
                    "belongs to which token: this family has no early exit; leave out exit_rule."
                )
        packed = {name: kwargs[name] for name in _PER_TOKEN if kwargs.get(name) is not None}
        for name, value in packed.items():
            packed[name] = grid.pack_once(value)
        return kwargs | packed

    def zero_key(self, step: Step, hidden: Tensor) -> Tensor | None:
        """The zero key of a step: `(kv, d)`, or `(b, kv, t, d)` where it is rotated along with the queries."""
        key = self.zero_keys.get(step)
        if key is None or self.plan.zero_rope == "origin":
            return key
        rotate = self.parts.rotations[step.layer]
        embeddings = self.inputs[step.layer].get("position_embeddings")
        if rotate is None or embeddings is None:  # a layer without positions in a family with them (Beam)
            return key
        if self.plan.zero_rope == "relative":
            embeddings = self.rotary_at(step.layer, hidden, self.inputs[step.layer]["position_ids"] - 1)
        cos, sin = embeddings
        per_query = key.to(cos.dtype)[None, :, None].expand(cos.shape[0], -1, cos.shape[1], -1)
        return rotate(per_query, per_query, cos, sin)[1]

    def rotary_at(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the family's rotary module at other positions."""
        if self.rotary is None:
            raise ZerodraftError(
                'zero_rope="relative" needs a family with a rotary_emb module; use "origin" or "none".'
            )
        by_type = () if self.parts.layer_types is None else (self.parts.layer_types[layer],)
        return self.rotary(hidden, positions, *by_type)
