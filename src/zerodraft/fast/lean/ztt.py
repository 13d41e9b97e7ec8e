"""What a Zero Token Transformer adds to the lean decode path: the order in which its layers run, zero tokens, gates,
and what its cycles are fed with and scaled by.

Every execution of a layer becomes a lean layer of its own. Those of one stored layer share its packed weights and
differ in what is defined here.

Legend: B rows of the batch, T tokens, N = B*T, D head size; h query heads, kv key-value heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex64, Float
from torch import Tensor

from zerodraft.ztt.attention import AdditiveMask, zero_attention_lse
from zerodraft.ztt.config import Plan, Step
from zerodraft.ztt.cycling import CycledLayers
from zerodraft.ztt.gates import CycleGates
from zerodraft.ztt.interface import Once
from zerodraft.ztt.model import ZttForCausalLM
from zerodraft.ztt.pool import ZeroTokenPool
from zerodraft.ztt.scalars import CycleScales, InputInjection

CYCLED_PARTS = (ZttForCausalLM, CycledLayers, ZeroTokenPool, CycleGates, InputInjection, CycleScales)
"""The modules that a Zero Token Transformer has beside its family's and that are computed here: no per-cycle LoRA."""

CYCLED_HOOKS = ("zerodraft.ztt.interface", "zerodraft.ztt.pretrained")
"""Where the hooks of `ffn_gate` come from, which is computed here."""


@dataclass(frozen=True, slots=True)
class LeanZero:
    """What one execution of a layer has beyond the layer.

    **Fields:** `key` is the zero token's, its rotary pairs side by side, or None without one; `turned`: it is rotated
    along with each query; `gates_ffn`: the FFN's output is scaled by the attention mass that is not the zero token's;
    `gate` scales what the layer adds to the residual stream, None for all of it; `injection` is how much of the head's
    output is added before the layer, `scale` what the stream is multiplied by after it, None where nothing is.
    """

    key: Float[Tensor, "kv D"] | None
    turned: bool
    gates_ffn: bool
    gate: float | None
    injection: float | None = None
    scale: float | None = None

    def attend(
        self,
        q: Float[Tensor, "B h T D"],
        k: Float[Tensor, "B kv S D"],
        v: Float[Tensor, "B kv S D"],
        turns: Complex64[Tensor, "N half"],
        *,
        bias: Tensor | None,
        masks: Once,
        is_causal: bool,
        scale: float,
        need_mass: bool,
    ) -> tuple[Float[Tensor, "B h T D"], Float[Tensor, "B h T"] | None]:
        """Attention with the zero token, and the mass on it if it is needed.

        **Args:** `turns` are the rotations of the queries' positions; `masks` keeps `bias` in the kernel's form for the
        other layers of the pass.
        """
        assert self.key is not None
        key = self.key
        if self.turned:
            pairs = torch.view_as_complex(key.unflatten(-1, (-1, 2))) * turns[:, None]
            key = torch.view_as_real(pairs).view(q.shape[0], q.shape[2], *key.shape).transpose(1, 2)
        mask = None if bias is None else masks(bias, lambda values: AdditiveMask.of(values, q))
        return zero_attention_lse(q, k, v, key, mask=mask, is_causal=is_causal, scale=scale, need_mass=need_mass)


@dataclass(frozen=True, slots=True)
class Stages:
    """The executions of head, cycles and tail."""

    head_layers: int
    shared_layers: int
    cycles: int
    tail_layers: int

    @classmethod
    def of(cls, plan: Plan) -> "Stages | None":
        """None where no cycle ends before the tail."""
        if plan.schedule != "block":
            return None
        return cls(plan.head_layers, plan.shared_layers, plan.cycles, len(plan.tail))

    @property
    def head(self) -> range:
        return range(self.head_layers)

    def cycle(self, number: int) -> range:
        """Of one cycle, counted from 1."""
        first = self.head_layers + (number - 1) * self.shared_layers
        return range(first, first + self.shared_layers)

    @property
    def tail(self) -> range:
        first = self.head_layers + self.cycles * self.shared_layers
        return range(first, first + self.tail_layers)


def family_model(model: Any) -> Any:
    """The model of the family that a Zero Token Transformer cycles; any other model itself."""
    return model.base if type(model) is ZttForCausalLM else model


def executions(model: ZttForCausalLM, frequencies: Float[Tensor, "half"]) -> list[tuple[Step, LeanZero | None]]:
    """The executions of a model's layers in order, each with what it has beyond its layer."""
    plan, gates = model._plan, None if model.cycle_gates is None else model.cycle_gates()
    first, last = plan.head_layers, plan.head_layers + plan.shared_layers - 1
    injection = None if model.input_injection is None else [None, *model.input_injection().tolist()]
    scales = None if model.cycle_scales is None else model.cycle_scales().tolist()
    keys = {} if model.zero_tokens is None else model.zero_tokens()
    made = []
    for step in (*plan.head, *plan.shared, *plan.tail):
        # only shared layers have a second cycle
        gate = None if gates is None or step.cycle == 0 else float(gates[step.cycle - 1, step.layer - plan.head_layers])
        key = keys.get(step)
        if key is not None:
            key = _ordered(key, frequencies if plan.zero_rope == "relative" else None)
        fed = None if injection is None or step.layer != first else injection[step.cycle]
        scale = None if scales is None or step.layer != last else scales[step.cycle]
        zero = LeanZero(key, plan.zero_rope != "origin", plan.ffn_gate, gate, fed, scale)
        made.append((step, zero if any(part is not None for part in (key, gate, fed, scale)) else None))
    return made


def _ordered(key: Float[Tensor, "kv D"], back: Float[Tensor, "half"] | None) -> Float[Tensor, "kv D"]:
    """A zero key with its rotary pairs side by side, turned back by one position if `back` gives the frequencies."""
    pairs = torch.complex(*key.chunk(2, dim=-1))
    if back is not None:
        pairs = pairs * torch.polar(torch.ones_like(back), -back)
    return torch.view_as_real(pairs).flatten(-2)
