"""Recognising the models that the lean decode path computes exactly, and laying out their weights for it.

A model qualifies only if every module in it is one that is known here: transformers' own classes of one Llama-like
family with plain linear layers and embeddings, and those of a Zero Token Transformer around it. Adapters, quantised
layers, hooks and replaced forwards all show up as something else, and the answer is no.
"""

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
from zerodraft.fast.lean.torch_layers import TorchLayers
from zerodraft.fast.lean.ztt import CYCLED_HOOKS, CYCLED_PARTS, Stages, executions, family_model
from zerodraft.fast.modules import VARYING_ROPE, has_plain_parameters, is_untouched
from zerodraft.fast.packed import HalvesLinear, PackedLinear, is_bfloat16
from zerodraft.ztt.config import Plan
from zerodraft.ztt.interface import PREFIX

logger = logging.getLogger(__name__)

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
SAMPLES, SMALL = 64, 1024
"""Numbers of a matrix that are compared to see whether it changed, and of a tensor that is compared as a whole."""
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)


@dataclass(frozen=True, slots=True)
class LeanSettings:
    """All that the lean path reads of a model beside its tensors, so that a change of any of it is noticed.

    **Fields:** `windows` are those of the stored layers, as in `LeanLayer`; `kept` is how much the cache of `generate`
    keeps of some layers, None for all; `eps` is that of all norms; `rope_scale`
    multiplies rotary turns, `score_scale` attention scores; `plan` is a Zero Token Transformer's.
    """

    windows: tuple[int | None, ...]
    kept: int | None
    head_dim: int
    eps: float
    rope_scale: float
    score_scale: float
    plan: Plan | None


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
    if not _qualifies(model):
        return None
    settings = _settings(model)
    mark = (settings, *_mark(model))
    with _lock:
        found = _packed.get(model)
        if found is None or found.mark != mark:
            found = None  # two copies of the weights may be one too many
            _packed.pop(model, None)
            weights = None
            if why := _obstacle(model, settings):
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


def halves_of(model: Any) -> torch.dtype | None:
    """The 16-bit type of weights in which alone a model differs from one that the lean path takes; None if it does not,
    or in more than that."""
    dtypes = {p.dtype for p in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in (torch.bfloat16, torch.float16) and _qualifies(model, dtype) else None


def _qualifies(model: Any, dtype: torch.dtype = torch.float32) -> bool:
    plain = family_model(model)
    family = _FAMILIES.get(getattr(getattr(plain, "config", None), "model_type", ""))
    return (
        family is not None
        and _made_of_known_parts(model, plain.config.model_type, family)
        and _plain_on_cpu(model, dtype)
        and _computes_as_known(plain)
        and not torch.is_autocast_enabled("cpu")
    )


def _made_of_known_parts(model: nn.Module, model_type: str, family: str) -> bool:
    home = f"transformers.models.{model_type}.modeling_{model_type}"
    own = {f"{family}{part}" for part in _PARTS}
    plain = family_model(model)
    more_parts, more_hooks = ((), ()) if plain is model else (CYCLED_PARTS, CYCLED_HOOKS)
    if type(plain).__name__ != f"{family}ForCausalLM":
        return False
    for module in model.modules():
        kind = type(module)
        known = kind in _PLAIN or kind in more_parts or (kind.__module__ == home and kind.__name__ in own)
        if not known and (kind.__module__, kind.__name__) != ("transformers.activations", "SiLUActivation"):
            return False
        if not is_untouched(module, more_hooks):
            return False
    return True


def _plain_on_cpu(model: nn.Module, dtype: torch.dtype) -> bool:
    return has_plain_parameters(model) and all(
        p.dtype is dtype and p.is_cpu and p.layout is torch.strided for p in model.parameters()
    )


def _computes_as_known(model: Any) -> bool:
    config, decoder = model.config, model.model
    rotary, layers = decoder.rotary_emb, decoder.layers[: config.num_hidden_layers]
    attention = [layer.self_attn for layer in layers]
    norms = [m for m in decoder.modules() if type(m).__name__.endswith("RMSNorm")]
    return (
        len(layers) > 0
        and not (model.training and config.attention_dropout > 0)
        and str(config._attn_implementation).removeprefix(PREFIX) in ("eager", "sdpa")
        and all("SiLU" in type(layer.mlp.act_fn).__name__ for layer in layers)
        and rotary.rope_type not in VARYING_ROPE
        and all(2 * rotary.inv_freq.numel() == a.head_dim and a.scaling == attention[0].scaling for a in attention)
        and len({norm.variance_epsilon for norm in norms}) == 1
        and getattr(config, "is_causal", True)
        and all(a.is_causal and a.head_dim == attention[0].head_dim for a in attention)
        and decoder.embed_tokens.max_norm is None
        and len(getattr(config, "layer_types", None) or layers) >= len(layers)
    )


def _obstacle(model: Any, settings: LeanSettings) -> str:
    """Why a model that qualifies by its parts is not packed, if there is a reason."""
    plain = family_model(model)
    shapes = [[p.shape for p in layer.parameters()] for layer in plain.model.layers[: len(settings.windows)]]
    if any(shape != shapes[0] for shape in shapes):
        return "its layers have weights of different shapes"
    if settings.kept not in (None, *settings.windows):
        return f"its cache keeps {settings.kept} tokens, as its configuration says, where its layers look at all"
    return ""


def _settings(model: Any) -> LeanSettings:
    plain = family_model(model)
    first = plain.model.layers[0].self_attn
    return LeanSettings(
        windows=_windows(plain),
        kept=getattr(plain.config, "sliding_window", None) if plain.config.model_type == "llama" else None,
        head_dim=first.head_dim,
        eps=plain.model.norm.variance_epsilon,
        rope_scale=float(plain.model.rotary_emb.attention_scaling),
        score_scale=float(first.scaling),
        plan=None if plain is model else model._plan,
    )


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


def _windows(plain: Any) -> tuple[int | None, ...]:
    """How far each layer's attention looks back: what the family's code makes of its configuration, and no more."""
    config, layers = plain.config, len(plain.model.layers[: plain.config.num_hidden_layers])
    if config.model_type == "llama":
        return (None,) * layers
    if config.model_type == "mistral":
        return (config.sliding_window,) * layers
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types[:layers])
