"""The layers of a lean pass with torch's operators: where no kernels can be compiled, and for FFNs that a zero token's
mass gates.

Legend as in `passes`; h query heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Complex64, Float
from torch import Tensor

from zerodraft.fast.lean.layer import LeanLayer
from zerodraft.fast.lean.passes import Ran, Tokens, is_met
from zerodraft.ztt.interface import Once


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchLayers:
    """One layer after another.

    **Fields:** `layers` in the order in which they run; numbers of heads; `floor` and `head_floor` as in `LeanWeights`;
    `scale` multiplies the attention scores; `head_layers` are those whose output is fed in again.
    """

    layers: Sequence[LeanLayer]
    heads: int
    kv_heads: int
    head_dim: int
    floor: Tensor
    head_floor: Tensor
    scale: float
    head_layers: int

    def run(
        self,
        x: Float[Tensor, "N H"],
        kv: Float[Tensor, "E B nk2 S D"],
        tokens: Tokens,
        stage: range,
        *,
        head_output: Float[Tensor, "N H"] | None = None,
        taps: Sequence[int] = (),
        masses: bool = False,
        last_only: bool = False,
    ) -> Ran:
        """See `Layers.run`."""
        turns, tokens = self._turns(tokens), _with_masks(tokens)
        tapped: dict[int, Tensor] = {}
        found: list[Tensor] = []
        if 0 in taps and stage.start == 0:
            tapped[0] = x
        for index in stage:
            layer, zero = self.layers[index], self.layers[index].zero
            if index == self.head_layers and head_output is not None:
                head_output.copy_(x)
            if zero is not None and zero.injection:
                assert head_output is not None
                x = torch.add(x, head_output, alpha=zero.injection)
            before = x
            queries = self._keep(layer, x, kv[index], tokens, turns)
            attended, mass = self._attend(layer, queries, kv[index], tokens, masses=masses)
            if masses and mass is not None:
                found.append(mass)
            x = layer.out.add(attended, x)
            y = unit(x, self.floor)
            y = layer.up.times(y, layer.gate.silu(y))
            if zero is not None and zero.gates_ffn and mass is not None:
                x = torch.addcmul(x, layer.down(y), (1 - mass.mean(1))[:, None])
            else:
                x = layer.down.add(y, x)
            if is_met(index + 1, stage) and index + 1 in taps:
                # as transformers has it: what the layer returns, which a cycle's gate and scale have not seen yet
                tapped[index + 1] = x
            if zero is not None and zero.gate is not None:
                x = torch.lerp(before, x, zero.gate)
            if zero is not None and zero.scale is not None:
                x = x * zero.scale
        return Ran(x, tapped, found)

    def catch_up(
        self,
        x: Float[Tensor, "N H"],
        kv: Float[Tensor, "E B nk2 S D"],
        tokens: Tokens,
        known: int,
        known_to: int,
        *,
        head_output: Float[Tensor, "N H"] | None = None,
    ) -> Float[Tensor, "N H"]:
        """See `Layers.catch_up`."""
        rows = torch.arange(len(x), device=x.device)
        others, own = tokens.pick(rows[known:], tokens.past + rows, None), head_output
        if own is not None:
            own = own[known:]
        behind = self.run(x[known:], kv, others, range(known_to), head_output=own).x
        x = torch.cat([x[:known], behind])
        return self.run(x, kv, tokens, range(known_to, len(self.layers)), head_output=head_output).x

    def keep(self, x: Float[Tensor, "N H"], kv: Float[Tensor, "E B nk2 S D"], tokens: Tokens, stage: range) -> None:
        """See `Layers.keep`."""
        turns = self._turns(tokens)
        for index in stage:
            self._keep(self.layers[index], x, kv[index], tokens, turns)

    def _turns(self, tokens: Tokens) -> Complex64[Tensor, "N heads half"]:
        """What turns queries and keys, ones for the values."""
        turning = self.heads + self.kv_heads
        shape = len(tokens.turns), turning + self.kv_heads, self.head_dim // 2
        turns = torch.ones(shape, dtype=torch.complex64, device=tokens.turns.device)
        turns[:, :turning] = tokens.turns[:, None]
        return turns

    def _keep(self, layer: LeanLayer, x: Tensor, kv: Tensor, tokens: Tokens, turns: Tensor) -> Float[Tensor, "B h T D"]:
        """Put keys and values in a layer's cache; the queries."""
        rows, all_heads, turning = len(x), self.heads + 2 * self.kv_heads, self.heads + self.kv_heads
        batch = len(kv) if tokens.texts is None else len(tokens.texts)
        qkv = layer.qkv(unit(x, self.floor))
        if layer.qk_gain is not None:
            qk = qkv.view(rows, all_heads, -1)[:, :turning]
            qk.copy_(unit(qk, self.head_floor).mul_(layer.qk_gain))
        pairs = torch.view_as_complex(qkv.view(rows, all_heads, self.head_dim // 2, 2))
        heads = torch.view_as_real(pairs.mul_(turns)).view(batch, rows // batch, all_heads, -1)
        fresh = heads[:, :, self.heads :]
        if tokens.places is None:
            kv[:, :, tokens.past : tokens.past + rows // batch] = fresh.transpose(1, 2)
        else:
            texts = torch.arange(batch, device=x.device) if tokens.texts is None else tokens.texts
            kv[texts[:, None], :, tokens.places.view(batch, -1)] = fresh
        return heads[:, :, : self.heads].transpose(1, 2)

    def _attend(
        self, layer: LeanLayer, queries: Float[Tensor, "B h T D"], kv: Tensor, tokens: Tokens, *, masses: bool
    ) -> tuple[Float[Tensor, "N width"], Float[Tensor, "N h"] | None]:
        """What the queries gather, and, if there is a zero token and somebody asks, its share by head."""
        seen, bias = kv[:, :, : tokens.seen], tokens.biases[layer.window]
        if tokens.texts is None:
            causal = tokens.causal and bias is None
            return self._gather(layer, queries, seen, tokens.turns, bias, tokens.masks, causal=causal, need=masses)
        assert bias is not None
        # one text after the other: a copy of what is seen for each token would take much memory
        attended = queries.new_empty(len(queries), self.heads * self.head_dim)
        shares = queries.new_empty(len(queries), self.heads)
        mass = None
        for text in tokens.texts.unique():
            own = (tokens.texts == text).nonzero()[:, 0]
            q, b = queries[own].transpose(0, 2), bias[own].transpose(0, 2)
            attended[own], mass = self._gather(
                layer, q, seen[text][None], tokens.turns[own], b, Once(), causal=False, need=masses
            )
            if mass is not None:
                shares[own] = mass
        return attended, None if mass is None else shares

    def _gather(
        self,
        layer: LeanLayer,
        queries: Tensor,
        seen: Tensor,
        turns: Tensor,
        bias: Tensor | None,
        masks: Once,
        *,
        causal: bool,
        need: bool,
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = seen.split(self.kv_heads, 1)
        zero, mass = layer.zero, None
        how: dict[str, Any] = {"is_causal": causal, "scale": self.scale}
        if zero is None or zero.key is None:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=True, **how)
        else:
            need = need or zero.gates_ffn
            out, mass = zero.attend(queries, keys, values, turns, bias=bias, masks=masks, need_mass=need, **how)
            mass = None if mass is None else mass.transpose(1, 2).reshape(-1, self.heads)
        return out.transpose(1, 2).reshape(len(turns), -1), mass


def _with_masks(tokens: Tokens) -> Tokens:
    """Torch's causal attention is over tokens without gaps: others have a bias for what each one does not see."""
    if not tokens.causal or tokens.places is None:
        return tokens
    hidden = torch.arange(tokens.seen, device=tokens.places.device) > tokens.places[:, None]
    bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
    bias = bias[None, None] if tokens.texts is None else bias[:, None, None]
    return replace(tokens, biases={window: bias if given is None else given for window, given in tokens.biases.items()})


def unit(x: Tensor, floor: Tensor) -> Tensor:
    """RMS norm but for the gain and a factor of sqrt(width), which the weights have taken in: the hypotenuse is
    sqrt(sum of squares + width * eps)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, floor)
