"""All layers of a lean pass in one call of the compiled kernels: no Python and no allocation between the products.

What the call does is what `TorchLayers` does with torch's operators, in the same layout of heads and cache; the tests
hold the two together.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.fast.compiled import CPU, PANEL, Draft, Exits, Kernels, LayerPointers, Pass, Shape, address, kernels
from zerodraft.fast.lean.layer import LeanLayer
from zerodraft.fast.lean.passes import Ran, Tokens, is_met
from zerodraft.fast.lean.scores import Scores
from zerodraft.fast.lean.ztt import Stages
from zerodraft.fast.packed import PackedLinear
from zerodraft.ztt.exits import ExitPolicy

PRODUCTS = ("qkv", "out", "gate", "up", "down")
SCORES = ("latent", "mean", "max", "min")
"""In the order of kernels/structures.h."""


class CompiledLayers:
    """Packed layers as the kernels take them: `count` of the `shape` that `functions` read at `pointers`."""

    def __init__(self, functions: Kernels, layers: Sequence[LeanLayer], shape: Shape) -> None:
        self.functions, self._layers, self.shape, self.count = functions, layers, shape, len(layers)
        self._nowhere: list[int | None] = [None] * len(layers)
        self.pointers = (LayerPointers * len(layers))(*(_pointers(layer, shape) for layer in layers))

    @staticmethod
    def of(
        layers: Sequence[LeanLayer],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
        head_layers: int = 0,
    ) -> "CompiledLayers | None":
        """None where there are no kernels, or for layers that they do not compute: FFNs that a zero token's mass gates.

        Args:
            layers: in the order in which they run.
            heads: of queries.
            kv_heads: of keys, and of values.
            head_dim: size of a head.
            eps: of the norms.
            scale: multiplies the attention scores.
            head_layers: those whose output a Zero Token Transformer feeds in again.
        """
        functions = kernels()
        zeros = [layer.zero for layer in layers if layer.zero is not None]
        if functions is None or head_dim % PANEL or any(zero.gates_ffn and zero.key is not None for zero in zeros):
            return None
        first = layers[0]
        hidden, inner, attended = first.qkv.in_features, first.gate.out_features, heads * head_dim
        sizes = {
            "qkv": (hidden, attended + 2 * kv_heads * head_dim),
            "out": (attended, hidden),
            "gate": (hidden, inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }
        products = [(sizes[name], getattr(layer, name)) for layer in layers for name in PRODUCTS]
        if any(
            product.panels is None or size != (product.in_features, product.out_features) for size, product in products
        ):
            return None
        shape = Shape(
            layers=len(layers),
            hidden=hidden,
            inner=inner,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            narrow=first.qkv.panel_dtype == torch.bfloat16,
            head_layers=head_layers if any(zero.injection for zero in zeros) else -1,
            gated=any(zero.gate is not None for zero in zeros),
            floor=math.sqrt(first.qkv.in_features * eps),
            head_floor=math.sqrt(head_dim * eps),
            scale=scale,
        )
        return CompiledLayers(functions, layers, shape)

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
        """See `Layers.run`; `x` becomes the stream behind the last layer."""
        layers = self._layers
        self.check_fed(head_output)
        tapped = {tap: torch.empty_like(x) for tap in taps if tap < len(layers) and is_met(tap, stage)}
        found: dict[int, Tensor] = {}
        if masses:
            with_zero = (i for i in stage if (zero := layers[i].zero) is not None and zero.key is not None)
            found = {i: x.new_empty(len(x), self.shape.heads) for i in with_zero}
        run = self.make_pass(x, kv, tokens, stage, head_output, 0, len(x) - 1 if last_only else 0)
        at, masses_at = self.addresses(tapped), self.addresses(found)
        self.functions.forward(self.shape, self.pointers, run, self.masks(x, kv, tokens), at, self._nowhere, masses_at)
        return Ran(x, tapped, list(found.values()))

    def run_fed(
        self, x: Float[Tensor, "N H"], kv: Float[Tensor, "L B nk2 S D"], tokens: Tokens, context: Float[Tensor, "M L H"]
    ) -> None:
        """Run all layers over one text whose first M tokens do no more than leave keys and values, of `context`, which
        says what they are in front of each layer. The rest of `x` becomes the stream behind the last layer."""
        new, hidden, none = len(context), self.shape.hidden, self._nowhere
        first, step = address(context, (new, self.count, hidden)), hidden * context.element_size()
        feeds = [first + i * step for i in range(self.count)] if new else none
        run = self.make_pass(x, kv, tokens, range(self.count), None, new, new)
        self.functions.forward(self.shape, self.pointers, run, self.masks(x, kv, tokens), none, feeds, none)

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
        self.check_fed(head_output)
        run, none = self.make_pass(x, kv, tokens, range(self.count), head_output, 0, 0), self._nowhere
        run.known, run.known_to = known, known_to
        self.functions.forward(self.shape, self.pointers, run, self.masks(x, kv, tokens), none, none, none)
        return x

    def keep(self, x: Float[Tensor, "N H"], kv: Float[Tensor, "E B nk2 S D"], tokens: Tokens, stage: range) -> None:
        """See `Layers.keep`."""
        run, none = self.make_pass(x, kv, tokens, stage, None, len(x), len(x)), self._nowhere
        self.functions.forward(self.shape, self.pointers, run, none, none, none, none)

    def check_fed(self, head_output: Tensor | None) -> None:
        if head_output is None and self.shape.head_layers >= 0:
            raise ZerodraftError("Cycles are fed with the head's output; give a tensor to keep it in.")

    def masks(self, x: Tensor, kv: Tensor, tokens: Tokens) -> list[int | None]:
        """Where each layer's bias is."""
        if all(bias is None for bias in tokens.biases.values()):
            return self._nowhere
        batch = kv.shape[1] if tokens.texts is None else len(tokens.texts)
        seen = (batch, 1, x.shape[0] // batch, tokens.seen)
        at = {window: None if bias is None else address(bias, seen) for window, bias in tokens.biases.items()}
        return [at[layer.window] for layer in self._layers]

    def addresses(self, found: Mapping[int, Tensor]) -> list[int | None]:
        """Where something of each layer goes, if anywhere."""
        if not found:
            return self._nowhere
        return [found[i].data_ptr() if i in found else None for i in range(len(self._layers))]

    def make_pass(
        self,
        x: Tensor,
        kv: Tensor,
        tokens: Tokens,
        stage: range,
        head_output: Tensor | None,
        context: int,
        last_from: int,
    ) -> Pass:
        """A pass over some executions; see `Pass` of kernels/structures.h."""
        shape, rows = self.shape, x.shape[0]  # len() of a tensor takes five times as long
        texts, capacity = kv.shape[1], kv.shape[3]
        batch = texts if tokens.texts is None else tokens.texts.shape[0]
        each, places = rows // batch, tokens.places
        if tokens.seen > capacity or rows % batch or context > rows:
            raise ZerodraftError(
                f"A pass of {rows} rows over {batch} texts does not fit into {tokens.seen} of {capacity} slots."
            )
        return Pass(
            first=stage.start,
            last=stage.stop,
            sequences=batch,
            tokens=each,
            past=tokens.past,
            capacity=capacity,
            seen=tokens.seen,
            texts=texts,
            causal=tokens.causal,
            masked_from=tokens.masked_from,
            context=context,
            feed_step=self.count * shape.hidden,
            last_from=last_from,
            x=address(x, (rows, shape.hidden)),
            head_output=None if head_output is None else address(head_output, (rows, shape.hidden)),
            turns=address(tokens.turns, (rows, shape.head_dim // 2), torch.complex64),
            kv=address(kv, (self.count, texts, 2 * shape.kv_heads, capacity, shape.head_dim)),
            places=None if places is None else address(places, (rows,), torch.int64),
            text_of=None if tokens.texts is None else address(tokens.texts, (batch,), torch.int64),
        )


class CompiledExits:
    """All layers with early exit in one call; a rule's scores for the tokens of every pass."""

    def __init__(self, layers: CompiledLayers, stages: Stages, scores: Scores, policy: ExitPolicy) -> None:
        self._layers = layers
        self._thresholds = (ctypes.c_float * len(scores.thresholds))(*scores.thresholds)
        # all but the depths is the same in every pass
        self._exits = Exits(
            head=stages.head_layers,
            shared=stages.shared_layers,
            cycles=stages.cycles,
            score=SCORES.index(scores.kind),
            first_read=scores.layers.start,
            end_read=scores.layers.stop,
            latest=policy == "latest",
            thresholds=ctypes.addressof(self._thresholds),
        )

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
        """See `EarlyExit.run`; `x` becomes the stream behind the last layer. Of more than one token `head_output` is
        used up."""
        layers, rows = self._layers, x.shape[0]
        layers.check_fed(head_output)
        depth = torch.ones(rows, dtype=torch.int64, device=CPU) if real is None else real.to(CPU, torch.int64)
        self._exits.depth = address(depth, (rows,), torch.int64)
        self._exits.noted = 0 if note is None else note[0]
        self._exits.states = None if note is None else address(note[1], (rows, layers.shape.hidden))
        tapped = {tap: torch.empty_like(x) for tap in taps if tap < layers.count} if taps else {}
        run = layers.make_pass(x, kv, tokens, range(layers.count), head_output, 0, rows - 1 if last_only else 0)
        masks, at = layers.masks(x, kv, tokens), layers.addresses(tapped)
        layers.functions.forward_with_exits(layers.shape, layers.pointers, run, masks, at, self._exits)
        return Ran(x, tapped, []), depth

    def draft(
        self,
        x: Float[Tensor, "N H"],
        kv: Float[Tensor, "E 1 nk2 S D"],
        tokens: Tokens,
        own: Draft,
        *,
        head_output: Float[Tensor, "N H"] | None,
        note: tuple[int, Float[Tensor, "N H"]],
    ) -> int:
        """Up to N tokens of one text, one after the other; how many. `x` is used up, `note` as in `EarlyExit.run`."""
        layers = self._layers
        layers.check_fed(head_output)
        self._exits.noted, self._exits.states = note[0], address(note[1], x.shape)
        run = layers.make_pass(x, kv, tokens, range(layers.count), head_output, 0, 0)
        return layers.functions.draft(layers.shape, layers.pointers, run, self._exits, own)


def _pointers(layer: LeanLayer, shape: Shape) -> LayerPointers:
    gains = {"before": layer.qkv.gain, "after": layer.gate.gain}
    pointers = {name: None if gain is None else address(gain, (shape.hidden,)) for name, gain in gains.items()}
    if layer.qk_gain is not None:
        pointers["qk_gain"] = address(layer.qk_gain, (shape.heads + shape.kv_heads, shape.head_dim))
    run: dict[str, Any] = {"cycle_gate": 1.0, "scale": 1.0}
    if (zero := layer.zero) is not None:
        given = {"cycle_gate": zero.gate, "injection": zero.injection, "scale": zero.scale}
        run |= {name: value for name, value in given.items() if value is not None}
        if zero.key is not None:
            run |= {"zero": address(zero.key, (shape.kv_heads, shape.head_dim)), "zero_turns": zero.turned}
    dtype = torch.bfloat16 if shape.narrow else torch.float32
    for name in PRODUCTS:
        product: PackedLinear = getattr(layer, name)
        panels, bias, outputs = product.panels, product.bias, product.out_features
        assert panels is not None
        pointers[name] = address(panels, (-(-outputs // PANEL), product.in_features, PANEL), dtype)
        pointers[f"{name}_bias"] = None if bias is None else address(bias, (outputs,))
    return LayerPointers(**pointers, **run)
