"""Turn a pretrained model into a Zero Token Transformer, and back.

*Deepen*: the same weights, more cycles. Gates of the extra cycles start closed, the first cycle has no zero tokens and
nothing of the input is fed in again, so the logits are exactly the base model's until training opens the gates.

*Compress*: L layers become head + K shared + tail, run in N cycles, with the depth kept: head + N * K + tail = L. So
step `s` of the unrolled model stands for layer `s` of the base model, and the shared weights are chosen from the base's
layers (`stepwise`) or averaged over those that they stand for (`average`); `svd` puts what the average loses into the
per-cycle LoRA. The three initialisations are those of Bae et al., "Relaxed Recursive Transformers", 2024.
"""

import copy
import difflib
from os import PathLike
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, initialization

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import check_finite, load_pretrained
from zerodraft.ztt.config import Step, ZttConfig
from zerodraft.ztt.families import find_parts
from zerodraft.ztt.interface import BACKENDS
from zerodraft.ztt.lora import CycleLora, matrix, projections
from zerodraft.ztt.model import ZttForCausalLM

Mode = Literal["deepen", "compress"]
Init = Literal["stepwise", "average", "svd"]

# Lists in family configurations that have one entry per layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta")


def from_base(
    model: nn.Module | str | PathLike[str],
    *,
    mode: str = "deepen",
    head_layers: int = 1,
    tail_layers: int = 1,
    cycles: int = 2,
    init: str = "stepwise",
    **settings: Any,
) -> ZttForCausalLM:
    """A Zero Token Transformer from a causal language model; the given model is not changed, its weights are copied.

    Args:
        model: A model with an LM head, or the directory, hub id or short name (`smollm2`) of one.
        mode: `"deepen"` keeps all layers and adds cycles; `"compress"` keeps the depth and shares layers.
        head_layers: First layers, run once.
        tail_layers: Last layers, run once.
        cycles: How often the layers between are run.
        init: Where compressed weights come from: `"stepwise"` (evenly spaced layers), `"average"` (mean of the layers
            that share), `"svd"` (that mean, and the rest into the LoRA of `cycle_lora_rank`).
        **settings: Further fields of `ZttConfig` (`schedule`, `zero_tokens`, `zero_rope`, `cycle_lora_rank`, ...).

    Raises:
        ZerodraftError: settings that do not fit the model or each other, an unknown setting, a model that cannot be
            cycled, is quantised, has no LM head or holds NaN.
    """
    _check_choice("mode", mode, get_args(Mode))
    _check_choice("init", init, get_args(Init))
    _check_settings(settings)
    if not isinstance(model, nn.Module):
        from zerodraft.models.resolve import resolve  # not at the top: the core needs no downloads

        model = load_pretrained(AutoModelForCausalLM, resolve(model))
    model = check_base(model)
    cycling: dict[str, Any] = {"head_layers": head_layers, "tail_layers": tail_layers, "cycles": cycles}
    base_config = copy.deepcopy(model.config)
    if settings.get("input_injection"):  # layers that never saw it are not to be fed with it at once
        settings = {"input_injection_start": 0.0} | settings
    if mode == "deepen":
        return _deepen(model, ZttConfig(base_config=base_config, **cycling, **_deepen_settings(settings, cycles)))
    return _compress(model, cycling, init, settings)


def to_base(model: ZttForCausalLM, *, unroll: bool = False) -> PreTrainedModel:
    """A plain model of the base family that computes the same; weights are copied.

    Args:
        model: The model to convert back.
        unroll: Give every execution of a shared layer a layer of its own, where there is more than one cycle.

    Raises:
        ZerodraftError: the plain family cannot compute what this model does: zero tokens, gates between 0 and 1, input
            that is fed in again, cycles that are scaled.
    """
    config = model.config
    if config.cycles > 1 and not unroll:
        raise ZerodraftError(
            f"This model runs its shared layers {config.cycles} times; unroll=True gives a plain model in which every "
            "cycle has layers of its own."
        )
    steps = [step for step in config.steps() if _gate(model, step) != 0]
    keys = {} if model.zero_tokens is None else model.zero_tokens()
    for step in steps:
        if step in keys:
            raise ZerodraftError(
                f"Layer {step.layer} attends to a zero token in cycle {step.cycle + 1}, which a plain "
                f"{type(model.base).__name__} cannot; only models without zero tokens convert back."
            )
        if _gate(model, step) != 1:
            raise ZerodraftError(
                f"The gate of layer {step.layer} in cycle {step.cycle + 1} is {_gate(model, step):.4g}, and a plain "
                f"{type(model.base).__name__} has no gates; only gates of exactly 0 and 1 convert back."
            )
    _check_scalars(model)
    path = find_parts(model.base).path  # pyright: ignore[reportArgumentType]  # a PreTrainedModel in ZttForCausalLM
    order = [step.layer for step in steps]
    try:
        plain = _empty(type(model.base), restack(config.base_config, order), model)
        plain.load_state_dict(restack_weights(model.base.state_dict(), path, order))
    except (IndexError, RuntimeError, ValueError) as error:
        raise ZerodraftError(
            f"The layers of a {type(model.base).__name__} depend on their position (not all have the same parts), so "
            "this family cannot be converted back with its cycles unrolled."
        ) from error
    if model.cycle_lora is not None:
        layers = plain.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        for layer, step in zip(layers, steps, strict=True):
            if config.is_shared(step.layer):
                _merge_lora(model.cycle_lora, step.layer - config.head_layers, step.cycle, layer)
    _check_equal(model, plain)
    return plain


def restack(base_config: Any, layers: list[int]) -> PreTrainedConfig:
    """A copy of a family's configuration for a model made of these of its layers, in this order."""
    config = copy.deepcopy(base_config)
    depth = config.num_hidden_layers
    config.num_hidden_layers = len(layers)
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) == depth:
            setattr(config, name, [values[layer] for layer in layers])
    return config


def restack_weights(state: dict[str, Tensor], path: str, layers: list[int]) -> dict[str, Tensor]:
    """The weights that go with `restack`: those of the layers at `path` numbered anew, all others as they are."""
    kept = {name: weight for name, weight in state.items() if not name.startswith(f"{path}.")}
    for position, layer in enumerate(layers):
        prefix = f"{path}.{layer}."
        for name, weight in state.items():
            if name.startswith(prefix):
                kept[f"{path}.{position}.{name.removeprefix(prefix)}"] = weight
    return kept


# -- deepen -------------------------------------------------------------------------------------------------------


def _deepen_settings(settings: dict[str, Any], cycles: int) -> dict[str, Any]:
    """The settings with which a deepened model starts as the base model, unless they contradict it."""
    if cycles == 1:
        exact: dict[str, Any] = {"zero_tokens": False}
    else:
        exact = {"cycle_gates": True, "zero_token_start": 2}
    chosen = exact | settings
    broken = [name for name in ("cycle_gates", "zero_tokens") if name in exact and chosen[name] != exact[name]]
    if chosen.get("input_injection") and chosen["input_injection_start"] != 0:
        broken.append("input_injection_start")
    if chosen.get("zero_tokens", True):
        broken += [name for name in ("edge_zero_tokens",) if chosen.get(name)]
        if chosen.get("zero_token_start", 1) < 2:
            broken.append("zero_token_start")
    if broken:
        raise ZerodraftError(
            f"{broken[0]}={chosen[broken[0]]!r} would change the base model's logits from the start, which "
            'mode="deepen" promises not to do; leave it out.'
        )
    return chosen


def _deepen(base: PreTrainedModel, config: ZttConfig) -> ZttForCausalLM:
    model = _empty(ZttForCausalLM, config, base)
    _load(model, base.state_dict(), base)
    return model


# -- compress -----------------------------------------------------------------------------------------------------


def _compress(base: PreTrainedModel, cycling: dict[str, Any], init: str, settings: dict[str, Any]) -> ZttForCausalLM:
    ZttConfig(base_config=copy.deepcopy(base.config), **cycling)  # complains about what no model allows
    depth = base.config.num_hidden_layers
    shared = _shared_layers(depth, **cycling)
    head, tail = cycling["head_layers"], cycling["tail_layers"]
    stored = head + shared + tail
    # Which base layers each stored layer stands for: step `s` of the schedule is base layer `s`.
    blank = ZttConfig(base_config=restack(base.config, list(range(stored))), **cycling, **settings)
    stands_for: list[list[Step]] = [[s for s in blank.steps() if s.layer == layer] for layer in range(stored)]
    chosen = [steps[0].slot for steps in stands_for]
    if init == "stepwise":
        chosen[head : head + shared] = _evenly_spaced(head, depth - tail, shared)
    config = ZttConfig(base_config=restack(base.config, chosen), **cycling, **settings)
    model = _empty(ZttForCausalLM, config, base)

    path = find_parts(base).path
    state = base.state_dict()
    kept = {name: weight for name, weight in state.items() if not name.startswith(f"{path}.")}
    for layer, steps in enumerate(stands_for):
        sources = [chosen[layer]] if init == "stepwise" else [step.slot for step in steps]
        prefix = f"{path}.{sources[0]}."
        for name in (key.removeprefix(prefix) for key in state if key.startswith(prefix)):
            kept[f"{path}.{layer}.{name}"] = _mean([state[f"{path}.{source}.{name}"] for source in sources])
    _load(model, kept, base)
    if init == "svd" and model.cycle_lora is not None:
        base_layers = base.get_submodule(path)
        assert isinstance(base_layers, nn.ModuleList)
        for layer, steps in enumerate(stands_for[head : head + shared]):
            for step in steps:
                _fill_lora(model.cycle_lora, layer, step.cycle, model.layers[head + layer], base_layers[step.slot])
    return model


def _shared_layers(depth: int, head_layers: int, tail_layers: int, cycles: int) -> int:
    """Shared layers K with head + cycles * K + tail = depth."""
    middle = depth - head_layers - tail_layers
    if middle % cycles == 0:
        return middle // cycles
    by_cycles = [n for n in range(2, middle + 1) if middle % n == 0]
    edges = [edge for edge in range(depth) if (depth - edge) % cycles == 0]
    nearest = sorted(edges, key=lambda e: abs(e - head_layers - tail_layers))[:3]
    raise ZerodraftError(
        f"{depth} layers cannot be compressed to head_layers={head_layers}, tail_layers={tail_layers} and "
        f"cycles={cycles}: the {middle} layers between must be a multiple of the cycles; "
        f"with this head and tail, cycles can be {', '.join(map(str, by_cycles)) or 'nothing'}; with these cycles, "
        f"head_layers + tail_layers can be {', '.join(map(str, sorted(nearest))) or 'nothing'}."
    )


def _evenly_spaced(start: int, stop: int, count: int) -> list[int]:
    """`count` of the layers `start` .. `stop - 1`, the first and the last among them; the middle one if it is one."""
    if count == 1:
        return [(start + stop - 1) // 2]
    return [start + round(i * (stop - start - 1) / (count - 1)) for i in range(count)]


def _mean(weights: list[Tensor]) -> Tensor:
    if len(weights) == 1 or not weights[0].is_floating_point():
        return weights[0].clone()
    return torch.stack([weight.float() for weight in weights]).mean(0).to(weights[0].dtype)


@torch.no_grad()
def _fill_lora(lora: CycleLora, layer: int, cycle: int, shared: nn.Module, base: nn.Module) -> None:
    """Put what the shared weights lack of the base layer's into one cycle's deltas, as far as the rank reaches."""
    wanted = dict(projections(base))
    for name, projection in projections(shared):
        delta = lora.delta(layer, name)
        up, down = best_low_rank(matrix(wanted[name]).float() - matrix(projection).float(), delta.down.shape[1])
        delta.up[cycle].copy_(up)
        delta.down[cycle].copy_(down)


def best_low_rank(
    residual: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """`up @ down` nearest to the residual in the Frobenius norm (truncated SVD), the singular values split evenly."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    reach = min(rank, len(s))
    root = s[:reach].sqrt()
    up, down = residual.new_zeros(len(u), rank), residual.new_zeros(rank, vh.shape[1])
    up[:, :reach] = u[:, :reach] * root
    down[:reach] = root[:, None] * vh[:reach]
    return up, down


# -- both ---------------------------------------------------------------------------------------------------------


def check_base(model: nn.Module) -> PreTrainedModel:
    """The model itself; raises `ZerodraftError` unless it is one that can be converted."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ZerodraftError(
            f"{name} is not a transformers model; give a PreTrainedModel (a PEFT model: its merge_and_unload())."
        )
    problems = {
        "is a Zero Token Transformer already; give a plain model": isinstance(model.config, ZttConfig),
        "has an encoder; give a decoder-only model": bool(getattr(model.config, "is_encoder_decoder", False)),
        "takes more than text; give its language model": model.config.get_text_config() is not model.config,
        "has no LM head; load it with AutoModelForCausalLM": model.get_output_embeddings() is None,
        "is quantised; load it unquantised or dequantise it first": hasattr(model.config, "quantization_config"),
        "is offloaded; load it whole into memory": any(p.is_meta for p in model.parameters()),
    }
    for problem, present in problems.items():
        if present:
            raise ZerodraftError(f"{name} {problem}.")
    find_parts(model)
    check_finite(model.named_parameters(), name)
    return model


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}."
        raise ZerodraftError(f"{name}={value!r} is unknown; {hint}")


def _check_settings(settings: dict[str, Any]) -> None:
    own = set(ZttConfig.__annotations__) - {"base_config", "exit_rule", "sub_configs_defaults", "model_type"}
    for name in settings:
        if name not in own:
            near = difflib.get_close_matches(name, [*sorted(own), "mode", "init"], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(sorted(own))}."
            raise ZerodraftError(f"from_base has no setting {name!r}; {hint}")


def _empty(model_class: Any, config: PreTrainedConfig, like: PreTrainedModel) -> Any:
    """A model whose weights are still to be loaded; all else (dtype, device, generation settings) is as in `like`."""
    attention = like.config._attn_implementation
    options = {"attn_implementation": attention} if attention in BACKENDS else {}
    with initialization.no_init_weights():  # they come from the base: seconds for nothing
        model = model_class._from_config(config, dtype=like.dtype, **options)
    model.tie_weights()
    if model_class is ZttForCausalLM:
        for own in (model.zero_tokens, model.cycle_lora):
            if own is not None:
                own.apply(model._init_weights)
    for module in model.modules():
        # As from_pretrained leaves it: what is filled must not be drawn again by a later post_init().
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]  # transformers' own mark
    model = model.to(like.device)
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.train(like.training)


def _load(model: ZttForCausalLM, state: dict[str, Tensor], like: PreTrainedModel) -> None:
    """Load the base family's weights, and what buffers the base keeps beside them outside its layers."""
    layers = find_parts(like).path
    for name, buffer in like.named_buffers():
        # A rotary module that was cast with its model (`.to(bfloat16)`) has lost digits, and so should ours.
        if name not in state and not name.startswith(f"{layers}."):
            owner, _, leaf = name.rpartition(".")
            ours, theirs = model.base.get_submodule(owner), like.get_submodule(owner)
            setattr(ours, leaf, buffer.clone())
            # frequencies that grew with a long text are those of its length ("dynamic")
            for counter, reached in vars(theirs).items():
                if counter.endswith("max_seq_len_cached"):
                    setattr(ours, counter, reached)
    try:
        model.base.load_state_dict(state)
    except RuntimeError as error:
        raise ZerodraftError(
            f"The model's weights are not those of a plain {type(model.base).__name__} (adapters, or changed modules); "
            "merge or remove the additions."
        ) from error


def _gate(model: ZttForCausalLM, step: Step) -> float:
    """The gate of an execution of a layer; 1 where there is none."""
    if model.cycle_gates is None or step.cycle == 0 or not model.config.is_shared(step.layer):
        return 1.0
    return float(model.cycle_gates().detach()[step.cycle - 1, step.layer - model.config.head_layers])


def _check_scalars(model: ZttForCausalLM) -> None:
    """Raise `ZerodraftError` if input is fed in again, a cycle's output is scaled, or streams are mixed."""
    family = type(model.base).__name__
    injection = [] if model.input_injection is None else model.input_injection().tolist()
    scales = [] if model.cycle_scales is None else model.cycle_scales().tolist()
    for cycle, value in enumerate(injection, 2):
        if value != 0:
            raise ZerodraftError(
                f"Cycle {cycle} adds {value:.4g} of the head's output to its input, which a plain {family} cannot; "
                "only an input injection of exactly 0 converts back."
            )
    for cycle, value in enumerate(scales, 1):
        if value != 1:
            raise ZerodraftError(
                f"The output of cycle {cycle} is multiplied by {value:.4g}, which a plain {family} cannot; only scales "
                "of exactly 1 convert back."
            )
    if model.residual_streams is not None and not model.residual_streams.is_plain:
        raise ZerodraftError(
            f"The cycles mix {model.config.residual_streams} residual streams, which a plain {family} cannot; only "
            "streams as they are before training convert back."
        )


@torch.no_grad()
def _merge_lora(lora: CycleLora, shared: int, cycle: int, layer: nn.Module) -> None:
    for name, projection in projections(layer):
        matrix(projection).add_(lora.delta(shared, name).weight(cycle))


@torch.no_grad()
def _check_equal(model: ZttForCausalLM, plain: PreTrainedModel) -> None:
    """A few tokens through both: what a family computes from a layer's position would not survive the conversion."""
    training = model.training
    tokens = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    ours, theirs = model.eval()(tokens).logits.float(), plain.eval()(tokens).logits.float()
    model.train(training)
    plain.train(training)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if float((ours - theirs).abs().max()) > tolerance * max(1.0, float(ours.abs().max())):
        raise ZerodraftError(
            f"The unrolled {type(plain).__name__} does not compute what the cycled model does (its layers depend on "
            "their position), so this family cannot be converted back."
        )
