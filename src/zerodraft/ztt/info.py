"""What a Zero Token Transformer costs: unrolled depth, parameters, FLOPs by number of cycles, KV cache bytes.

All of it is read off the modules, so it holds for every family. A FLOP is one multiplication or one addition in a
matrix product; norms, activations, softmax and rotary positions are not counted. `zerodraft.ztt.flops` measures what is
computed here.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from zerodraft.common.errors import ZerodraftError
from zerodraft.ztt.config import Step, ZttConfig
from zerodraft.ztt.exits import ExitPolicy
from zerodraft.ztt.families import attention_of, kv_shape
from zerodraft.ztt.lora import CycleLora, matrix, projections
from zerodraft.ztt.model import ZttForCausalLM
from zerodraft.ztt.pool import ZeroTokenPool
from zerodraft.ztt.pretrained import OWN_PARTS

Part = Literal[
    "embedding",
    "head",
    "shared",
    "tail",
    "output",
    "zero_tokens",
    "cycle_gates",
    "input_injection",
    "cycle_scales",
    "residual_streams",
    "cycle_lora",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Sizes and costs of a model.

    Attributes:
        family: The base family, as its configuration calls it.
        head_layers: Layers run once at the start.
        shared_layers: Layers run `cycles` times.
        tail_layers: Layers run once at the end.
        cycles: N.
        depth: Layers of the unrolled model, and slots of its KV cache.
        parameters: Count by part, and `total`; a weight that is used in several places is counted once. `output` is
            the final norm and the LM head, as far as that is not the embedding.
        context: Tokens that the attention sees in `flops_per_token`.
        flops_per_token: Of decoding one token, by the number of cycles it runs (1 .. N).
        kv_bytes_per_token: In the cache, over all slots, at `dtype`.
        dtype: Of weights and cache.
    """

    family: str
    head_layers: int
    shared_layers: int
    tail_layers: int
    cycles: int
    depth: int
    parameters: dict[str, int]
    context: int
    flops_per_token: tuple[int, ...]
    kv_bytes_per_token: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"flops_per_token": list(self.flops_per_token)}


def model_info(model: ZttForCausalLM | ZttConfig, *, context: int = 1024) -> ModelInfo:
    """Sizes and costs of a model; of a configuration without making its weights.

    Args:
        model: The model, or its configuration.
        context: Tokens that the attention sees, the token itself included.

    Raises:
        ZerodraftError: `context` is below 1.
    """
    if context < 1:
        raise ZerodraftError(f"context={context} must be at least 1.")
    if isinstance(model, ZttConfig):
        with torch.device("meta"):
            model = ZttForCausalLM._from_config(model)
    config, costs = model.config, Costs(model)
    kv_heads, head_dim = kv_shape(config.base_config, model.layers[0])  # pyright: ignore[reportArgumentType]  # no dict
    return ModelInfo(
        family=config.base_config.model_type,  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue]
        head_layers=config.head_layers,
        shared_layers=config.shared_layers,
        tail_layers=config.tail_layers,
        cycles=config.cycles,
        depth=config.num_hidden_layers,
        parameters=count_parameters(model),
        context=context,
        flops_per_token=costs.tokens(context),
        kv_bytes_per_token=config.num_hidden_layers * 2 * kv_heads * head_dim * model.dtype.itemsize,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def count_parameters(model: ZttForCausalLM) -> dict[str, int]:
    """Parameters by part, each counted once however often it is used; the last entry is their `total`."""
    counts: Counter[str] = Counter()
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    layers = [{id(p) for p in layer.parameters()} for layer in model.layers]
    for name, parameter in model.named_parameters():
        counts[_part(model, name, id(parameter), embeddings, layers)] += parameter.numel()
    parts = {part: counts[part] for part in Part.__args__ if counts[part] or part in ("head", "shared", "tail")}
    return parts | {"total": sum(parts.values())}


def _part(model: ZttForCausalLM, name: str, key: int, embeddings: set[int], layers: list[set[int]]) -> Part:
    for own in OWN_PARTS:
        if name.startswith(own):
            return own
    for index, layer in enumerate(layers):
        if key in layer:
            return "shared" if model.config.is_shared(index) else "head" if index < model.config.head_layers else "tail"
    return "embedding" if key in embeddings else "output"


def predicted_flops(
    model: ZttForCausalLM,
    depth: Int[Tensor, "b t"],
    *,
    past: int = 0,
    logits: int | None = None,
    policy: ExitPolicy = "propagate",
) -> int:
    """FLOPs of one forward pass with early exit, as they are executed.

    Args:
        model: The model.
        depth: Cycles that each token runs; 0 for padding, which runs the first with the others.
        past: Tokens in the cache before.
        logits: Positions per row whose logits are made; all of them unless given.
        policy: What deeper cycles see of an exited token.
    """
    return Costs(model).forward(depth, past, depth.shape[1] if logits is None else logits, policy)


class Costs:
    """FLOPs of a model's pieces: of each execution of a layer by token, and by query-key pair."""

    def __init__(self, model: ZttForCausalLM) -> None:
        self.model, self.config, self.lora = model, model.config, model.cycle_lora
        base: Any = self.config.base_config
        _, head_dim = kv_shape(base, model.layers[0])
        self.attention_width = base.num_attention_heads * head_dim
        self.zero_steps = set(model.zero_tokens()) if isinstance(model.zero_tokens, ZeroTokenPool) else set()
        lm_head: Any = model.get_output_embeddings()
        self.lm_head = 0 if lm_head is None else 2 * lm_head.weight.numel()
        inside = {id(module) for layer in model.layers for module in layer.modules()}
        outside = [m for _, m in projections(model.base) if id(m) not in inside and m is not lm_head]
        mixed = model.residual_streams
        self.mixing = 0 if mixed is None else 2 * mixed.weight[0].numel()  # of a token, between two cycles
        self.around = sum(2 * module.weight.numel() for module in outside)  # OPT projects its embeddings

    def projections(self, step: Step, only_kv: bool = False) -> int:
        """Of one token through the projections of a layer; or as far as its keys and values need them."""
        layer, total = self.model.layers[step.layer], 0
        before_cache = {id(p) for _, p in list(projections(attention_of(layer)))[:-1]}  # all but the output projection
        for name, projection in projections(layer):
            if only_kv and id(projection) not in before_cache:
                continue
            total += 2 * matrix(projection).numel()
            if isinstance(self.lora, CycleLora) and self.config.is_shared(step.layer):
                delta = self.lora.delta(step.layer - self.config.head_layers, name)
                total += 2 * (delta.down[0].numel() + delta.up[0].numel())
        return total

    def attention(self, step: Step, queries: int, keys: int) -> int:
        """Of all heads, scores and weighted sums of every query with every key, and the zero token's scores."""
        zero = 2 * self.attention_width * queries if step in self.zero_steps else 0
        return 4 * self.attention_width * queries * keys + zero

    def tokens(self, context: int) -> tuple[int, ...]:
        """Of one decoded token that runs 1, 2, ... cycles; a layer with a sliding window sees no more than that."""
        cycles = [0] * self.config.cycles
        cycles[0] = self.lm_head + self.around
        for step in self.config.steps():
            cycles[step.cycle] += self.projections(step) + self.attention(step, 1, self.seen(step, context - 1) + 1)
        cycles[1:] = [cost + self.mixing for cost in cycles[1:]]
        return tuple(accumulate(cycles))

    def seen(self, step: Step, past: int) -> int:
        """How many of the past tokens a layer's cache holds: with a sliding window, no more than that reaches."""
        window, kinds = getattr(self.config, "sliding_window", None), getattr(self.config, "layer_types", None)
        if window is None or (kinds is not None and kinds[step.slot] != "sliding_attention"):
            return past
        return min(past, window - 1)

    def forward(self, depth: Int[Tensor, "b t"], past: int, logits: int, policy: ExitPolicy) -> int:
        """See `predicted_flops`. A compacted step projects the running tokens only, but attends from every place."""
        rows, length = depth.shape
        everything = rows * length
        total = rows * logits * self.lm_head + everything * self.around
        for step in self.config.steps():
            cycle, shared = step.cycle, self.config.is_shared(step.layer)
            running = int((depth > cycle).sum()) if shared and cycle > 0 else everything
            keys = self.seen(step, past) + length
            if running:
                total += running * self.projections(step) + self.attention(step, everything, keys)
                total += running * self.mixing if cycle > 0 and step.layer == self.config.head_layers else 0
            if shared and cycle > 0 and policy == "propagate":
                # Keys and values of frozen states: once for each exited token; in every cycle where cycles differ.
                frozen = (depth > 0) & (depth <= cycle) if self.lora is not None else depth == cycle
                total += int(frozen.sum()) * self.projections(step, only_kv=True)
        return total
