"""The weights of a model, laid out for the lean decode path, and kept until the model changes."""

import logging
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Complex64, Float, Int
from torch import Tensor, nn

from zerodraft.decoding.kept import versions
from zerodraft.fast.compiled import CPU
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.layer import LeanLayer, gain_of, pack_layer
from zerodraft.fast.lean.passes import Layers
from zerodraft.fast.lean.recognise import LeanSettings, obstacle, qualifies
from zerodraft.fast.lean.torch_layers import TorchLayers, unit
from zerodraft.fast.lean.ztt import Stages, executions, family_model
from zerodraft.fast.packed import HalvesLinear, PackedLinear, is_bfloat16

logger = logging.getLogger(__name__)

SAMPLES, SMALL = 64, 1024
"""Numbers of a matrix that are compared to see whether it changed, and of a tensor that is compared as a whole."""


@dataclass(frozen=True, slots=True)
class LeanWeights:
    """All that the lean path needs of a model.

    **Fields:** `layers` are in the order in which they run, each as often as it runs; `run` runs them; `stages` are
    those of a Zero Token Transformer whose cycles end one after the other, None for others; `floor` is sqrt(width *
    eps), what a norm's hypotenuse has beside the vector's length; `frequencies` and `rope_scale` give the rotary
    angles; `feeds_again`: cycles are fed with the head's output.
    """

    embedding: Tensor
    layers: tuple[LeanLayer, ...]
    run: Layers
    stages: Stages | None
    final_gain: Tensor
    eps: float
    head: PackedLinear
    floor: Tensor
    frequencies: Tensor
    rope_scale: float
    heads: int
    kv_heads: int
    head_dim: int
    feeds_again: bool

    def logits(self, x: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """What the LM head makes of the stream behind the last layer, or behind a cycle."""
        return self.head(unit(x, self.floor))


@dataclass(frozen=True, slots=True)
class _Packed:
    """What became of a model as `mark` describes it: its packed weights, or None where these do not do."""

    mark: tuple[Any, ...]
    weights: LeanWeights | None


_packed: "WeakKeyDictionary[nn.Module, _Packed]" = WeakKeyDictionary()
_lock = threading.Lock()

Accept = Callable[[Any, LeanWeights], bool]
"""Whether decoding with a model's packed weights gives what the model gives."""


def lean_weights(model: nn.Module, accept: Accept) -> LeanWeights | None:
    """The packed weights of a model, shared by all calls until the model changes; None if the lean path cannot compute
    it exactly, as its parts say or as `accept` says, which is asked once.

    Changed weights are noticed by the tensors' addresses and version counters, which optimizers and `load_state_dict`
    move. An edit through `.data` moves neither: it is noticed by the numbers on a diagonal of every matrix and by all
    of a small tensor's. So what changes a matrix as a whole is noticed, as merging an adapter does; after an edit of
    single rows call `release_lean`.
    """
    if not qualifies(model):
        return None
    settings = LeanSettings.of(model)
    mark = (settings, *_mark(model))
    with _lock:
        found = _packed.get(model)
        if found is None or found.mark != mark:
            found = None  # two copies of the weights may be one too many
            _packed.pop(model, None)
            weights = None
            if why := obstacle(model, settings):
                logger.warning("%s is run by its own forward pass alone: %s", type(model).__name__, why)
            else:
                weights = _pack(model, settings)
            found = _Packed(mark, weights if weights is not None and accept(model, weights) else None)
            _packed[model] = found
    return found.weights


def rotations(
    positions: Int[Tensor, " n"], frequencies: Float[Tensor, " pairs"], scale: float
) -> Complex64[Tensor, "n pairs"]:
    """What multiplies each pair of elements of the queries and keys at some positions."""
    angles = positions[:, None].float() * frequencies
    return torch.complex(angles.cos(), angles.sin()) * scale


def release_lean(model: nn.Module) -> None:
    """Forget a model's packed weights; their memory is free when no `LeanTarget` uses them any more."""
    with _lock:
        _packed.pop(model, None)


def _mark(model: nn.Module) -> tuple[Any, ...]:
    """Where a model's tensors are, how often they were changed, and some of their numbers."""
    tensors = (*model.parameters(), *model.buffers())
    with torch.no_grad():
        some = torch.cat([_some(t) for t in tensors if t.dtype == torch.float32])
    return versions(tensors), some.numpy().tobytes()  # bytes: a NaN is equal to itself


def _some(tensor: Tensor) -> Tensor:
    """All numbers of a small tensor; of a matrix a diagonal, so that no more than one is in the same row or column."""
    if tensor.numel() <= SMALL or tensor.ndim != 2:
        return tensor.reshape(-1)[:SMALL]
    (rows, columns), (down, right) = tensor.shape, tensor.stride()
    count = min(SAMPLES, rows, columns)
    return tensor.as_strided((count,), (rows // count * down + columns // count * right,))


@torch.no_grad()
def _pack(model: Any, settings: LeanSettings) -> LeanWeights:
    plain = family_model(model)
    decoder, head_dim, eps = plain.model, settings.head_dim, settings.eps
    layers = decoder.layers[: len(settings.windows)]
    first = layers[0].self_attn
    hidden = decoder.embed_tokens.embedding_dim
    frequencies = decoder.rotary_emb.inv_freq.detach().float().clone()
    linear = _linear(layers)
    packed = [
        pack_layer(layer, head_dim, window, linear) for layer, window in zip(layers, settings.windows, strict=True)
    ]
    if plain is not model:
        packed = [replace(packed[step.layer], zero=zero) for step, zero in executions(model, frequencies)]
    heads, kv_heads = (len(part.weight) // head_dim for part in (first.q_proj, first.k_proj))
    how = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": settings.score_scale}
    how["head_layers"] = 0 if settings.plan is None else settings.plan.head_layers
    floor, head_floor = (
        torch.tensor(math.sqrt(width * eps), dtype=torch.float32, device=CPU) for width in (hidden, head_dim)
    )
    run: Layers | None = CompiledLayers.of(packed, eps=eps, **how)
    if run is None:
        run = TorchLayers(layers=packed, floor=floor, head_floor=head_floor, **how)
    return LeanWeights(
        embedding=decoder.embed_tokens.weight.detach(),
        layers=tuple(packed),
        run=run,
        stages=None if settings.plan is None else Stages.of(settings.plan),
        final_gain=decoder.norm.weight.detach(),
        eps=eps,
        head=_linear([plain.lm_head]).of(plain.lm_head, gain_of(decoder.norm)),
        floor=floor,
        frequencies=frequencies,
        rope_scale=settings.rope_scale,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feeds_again=any(layer.zero is not None and layer.zero.injection for layer in packed),
    )


def _linear(modules: Iterable[nn.Module]) -> type[PackedLinear]:
    """How the weights of some modules are packed: in 16 bits if nothing is lost."""
    weights = (m.weight for module in modules for m in module.modules() if isinstance(m, nn.Linear))
    return HalvesLinear if all(map(is_bfloat16, weights)) else PackedLinear
