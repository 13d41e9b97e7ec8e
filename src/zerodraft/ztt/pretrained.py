"""What the Zero Token Transformer's models share: construction over a family's own model, and one forward pass.

The family's model (`.base`) is built from its own configuration and its list of layers turned into a `CycledLayers`;
besides that there are the `OWN_PARTS` and nothing else.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, initialization

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.caches import KNOWN
from zerodraft.ztt.config import ZttConfig
from zerodraft.ztt.cycling import CycledLayers, CycleOptions, CycleRun, Readout
from zerodraft.ztt.exits import ExitPolicy, ExitRule, exit_rule_from_dict
from zerodraft.ztt.families import (
    attention_of,
    check_zero_rope,
    ffn_output_of,
    find_parts,
    rotary_module,
    shared_kv_shape,
)
from zerodraft.ztt.gates import CycleGates
from zerodraft.ztt.hooks import SlotHook
from zerodraft.ztt.interface import announce_call, attention_name, current
from zerodraft.ztt.lora import CycleLora, projections
from zerodraft.ztt.pool import ZeroTokenPool
from zerodraft.ztt.scalars import CycleScalars, CycleScales, InputInjection
from zerodraft.ztt.streams import ResidualStreams, StreamStates

OWN_PARTS = ("zero_tokens", "cycle_gates", "input_injection", "cycle_scales", "residual_streams", "cycle_lora")
"""The modules that a Zero Token Transformer has beside its family's model."""

UNMASKED = {"input_ids", "inputs_embeds", "logits_to_keep"}
"""Arguments of a forward pass that say nothing about masks."""


@dataclass
class ExitRecord:
    """Early exit of one `generate` call: what to do, and the depth of every position so far."""

    model: "ZttPreTrainedModel"
    rule: ExitRule
    policy: ExitPolicy
    depth: Int[Tensor, "b t"] | None = None

    def note(self, start: int, depth: Int[Tensor, "b t"]) -> None:
        """Take over the depths of the positions from `start` on; rolled-back ones (assisted decoding) are replaced."""
        if self.depth is None or len(self.depth) != len(depth):
            # Positions that a cache from an earlier call brought along were not computed here.
            self.depth = depth.new_zeros(len(depth), start)
        self.tell(torch.cat([self.depth[:, :start], depth], 1))

    def keep(self, start: int, kept: Sequence[int]) -> None:
        """Of the positions that were noted from `start` on these are the text's, in this order: a draft's tree was
        computed, and one of its paths accepted. For a single row."""
        if self.depth is not None:
            self.tell(torch.cat([self.depth[:, :start], self.depth[:, start:][:, list(kept)]], 1))

    @contextmanager
    def holds(self) -> Iterator[None]:
        """Every forward pass of the model within this context, in this thread, exits early."""
        outer, current.generation = current.generation, self
        try:
            yield
        finally:
            current.generation = outer

    def tell(self, depth: Int[Tensor, "b t"]) -> None:
        """Take over the depths of all positions so far; streamers read them while the text grows."""
        self.depth = self.model.last_exit = depth


def _gate_ffn(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook on an FFN: scale its output by one minus the layer's zero-token mass (mean over heads)."""
    call = current.call
    if call is None or call.mass is None:
        return None
    if isinstance(output, tuple):  # and the router's scores (Llama 4)
        return _gate_ffn(module, args, output[0]), *output[1:]
    return output * (1 - call.mass.mean(-1)).reshape(*output.shape[:-1], 1).to(output.dtype)


class ZttPreTrainedModel(PreTrainedModel):
    """What `ZttModel` and `ZttForCausalLM` share: construction over a family and the cycling of its layers."""

    config_class = ZttConfig
    config: ZttConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = [*KNOWN]

    base: nn.Module
    last_exit: Int[Tensor, "b t"] | None = None

    def __init__(self, config: PreTrainedConfig) -> None:
        if not isinstance(config, ZttConfig):
            raise ZerodraftError(
                f"{type(self).__name__} needs a ZttConfig, not {type(config).__name__}; turn a plain model into a Zero "
                "Token Transformer with ZttForCausalLM.from_base(MODEL)."
            )
        super().__init__(config)

    def _attach(self, base: nn.Module, family: PreTrainedModel) -> None:
        """Take over a family's model: cycle its layers, add the parts that are not the family's."""
        config = self.config
        parts = find_parts(family)
        parent, name = family.get_submodule(parts.path.rpartition(".")[0]), parts.path.rpartition(".")[2]
        setattr(parent, name, CycledLayers(getattr(parent, name)))
        self.base = base
        self._parts, self._plan = parts, config.plan()
        self._cycled_path = next(path for path, m in self.named_modules() if isinstance(m, CycledLayers))
        shared = self.layers[config.head_layers : config.head_layers + config.shared_layers]
        zeroed = self.layers if config.edge_zero_tokens else shared  # those that may attend to a zero token
        self.zero_tokens = None
        if config.zero_tokens:
            check_zero_rope(config.zero_rope, self.layers[0])
            self.zero_tokens = ZeroTokenPool(config, *shared_kv_shape(config.family, zeroed or self.layers[:1]))
        self.cycle_gates = CycleGates(config) if config.cycle_gates and config.cycles > 1 else None
        self.input_injection = InputInjection(config) if config.input_injection and config.cycles > 1 else None
        self.cycle_scales = CycleScales(config) if config.cycle_scales and config.cycles > 1 else None
        mixed = config.residual_streams > 1 and config.cycles > 1
        self.residual_streams = ResidualStreams(config) if mixed else None
        self.cycle_lora = CycleLora(shared, config.cycles, config.cycle_lora_rank) if config.cycle_lora_rank else None
        if config.ffn_gate or config.cycle_lora_rank:
            for layer in self.layers:
                attention_of(layer).register_forward_pre_hook(announce_call, with_kwargs=True)
        self._slot_hooks: list[SlotHook] = []
        if config.cycle_lora_rank:
            for place, layer in enumerate(shared):
                for name, _ in projections(layer):
                    self._slot_hooks.append(SlotHook(layer, name, partial(self._add_delta, place, name)))
        if config.ffn_gate and config.zero_tokens:
            for layer in zeroed:
                self._slot_hooks.append(SlotHook(layer, ffn_output_of(layer), _gate_ffn))
        self.post_init()

    def _add_delta(
        self, place: int, name: str, projection: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Forward hook on a shared layer's projection: add the running cycle's delta."""
        call = current.call
        if call is None or self.cycle_lora is None:  # the layer runs by itself, outside the cycles
            return output
        return output + self.cycle_lora(place, name, args[0], call.cycle)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; no code beside the weights is run or asked about unless the caller says so.

        Raises:
            ZerodraftError: the weights are those of another kind of model, of which nothing fits this one.
        """
        kwargs.setdefault("trust_remote_code", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        layers = {name for name in model.state_dict() if name.startswith(f"{model._cycled_path}.")}
        if info["unexpected_keys"] and layers <= set(info["missing_keys"]):
            raise ZerodraftError(
                f"There is nothing in {args[0] if args else 'the checkpoint'!r} that fits a Zero Token Transformer; "
                "turn a plain model into one with ZttForCausalLM.from_base(MODEL)."
            )
        return (model, info) if output_loading_info else model

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Files name the gates alone, as they did when the gates were a parameter and no module.
        if f"{prefix}cycle_gates" in state_dict:
            state_dict[f"{prefix}cycle_gates.weight"] = state_dict.pop(f"{prefix}cycle_gates")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def layers(self) -> list[nn.Module]:
        """The stored decoder layers, head first; each exists once, however often it is run."""
        cycled = self.get_submodule(self._cycled_path)
        assert isinstance(cycled, CycledLayers)
        return cycled.stored

    def _base_config(self) -> Any:
        """The family's configuration as its modules get it: ours, but with our attention function."""
        base_config = copy.deepcopy(self.config.family)
        base_config._attn_implementation = attention_name(self.config._attn_implementation)
        return base_config

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Switch between `sdpa`, `eager` and `flex_attention`, with zero tokens in all of them."""
        if not isinstance(attn_implementation, str):
            raise ZerodraftError("attn_implementation must be one name: sdpa, eager or flex_attention.")
        name = attention_name(attn_implementation)
        self.config._attn_implementation = attn_implementation
        for module in self.base.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = name

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: these models initialise by transformers' own functions, which leave alone what a file has filled.

        In custom code, modules without weights of their own would not be asked (GPT-2's model, which scales by depth).
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, ZeroTokenPool):
            for keys in module.parameters(recurse=False):
                initialization.normal_(keys, std=std)
        elif isinstance(module, (CycleGates, CycleScalars, ResidualStreams, CycleLora)):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.family.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.family.set_input_embeddings(value)

    @property
    def family(self) -> PreTrainedModel:
        """The family's model inside; called by itself it runs its layers once, without the cycles."""
        raise NotImplementedError

    def calibrated_exit_rule(self) -> ExitRule:
        """The early-exit rule that calibration wrote into the configuration.

        Raises:
            ZerodraftError: the model has not been calibrated.
        """
        if self.config.exit_rule is None:
            raise ZerodraftError("This model has no calibrated exit rule; run `zerodraft calibrate` on it first.")
        return exit_rule_from_dict(self.config.exit_rule)

    def readout(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits of hidden states through the final norm and the LM head alone (states for a model without a head)."""
        embedding = self.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        blank = embedding.new_zeros(len(hidden), 1, embedding.shape[1])
        with Readout(hidden[:, None].to(embedding.dtype)).drives():
            out = self.family(inputs_embeds=blank, use_cache=False, return_dict=True)
        return (out.logits if "logits" in out else out.last_hidden_state)[:, 0]

    # -- forward --------------------------------------------------------------------------------------------------

    def _cycle(
        self,
        options: CycleOptions,
        *,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> tuple[Any, CycleRun]:
        """Run the family's forward pass over the cycled layers; its output, and the run with what it collected."""
        length = _length_of(inputs)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        if not use_cache:
            cache = None
        elif cache is None and not options.every_cycle:
            cache = DynamicCache(config=self.config)
        generation: ExitRecord | None = current.generation
        if generation is not None and generation.model is self:
            options = replace(options, rule=generation.rule, policy=generation.policy)
        options.check(self._plan)
        cycles = self._plan.cycles if options.cycles is None else options.cycles
        if cache is not None and not torch.compiler.is_compiling():  # no graph branches on a cache's length
            self._check_cache(cache, options, cycles)
        start = 0
        if options.rule is not None and cache is not None:
            start = int(cache.get_seq_length())
        for hook in self._slot_hooks:
            hook.follow()
        run = CycleRun(
            options=options,
            plan=self._plan,
            layers=self.layers,
            parts=self._parts,
            zero_keys={} if self.zero_tokens is None else self.zero_tokens(),
            gates=None if self.cycle_gates is None else self.cycle_gates(),
            injection=None if self.input_injection is None else self.input_injection(),
            scales=None if self.cycle_scales is None else self.cycle_scales(),
            streams=None if self.residual_streams is None else StreamStates(*self.residual_streams()),
            rotary=rotary_module(self.family, self._parts.path),
            cache=cache,
            cycles=cycles,
            real=None if options.rule is None else _real_tokens(inputs.get("attention_mask"), start, length),
            causal_only=cache is None and {name for name, value in inputs.items() if value is not None} <= UNMASKED,
            readout=self.readout,
        )
        states = inputs.pop("output_hidden_states", self.config.output_hidden_states)
        if attentions := inputs.pop("output_attentions", self.config.output_attentions):
            self._check_attentions()
        with run.drives():
            out = self.family(
                use_cache=cache is not None,
                output_hidden_states=bool(states),
                output_attentions=bool(attentions),
                return_dict=True,
                **{self._parts.model_cache_argument: cache},
                **inputs,
            )
        if states and not isinstance(states, bool):
            # Selected here: the family would count its stored layers.
            out.hidden_states = _select(out.hidden_states, [states] if isinstance(states, int) else states)
        if generation is not None and run.exit_depth is not None:
            generation.note(start, run.exit_depth)
        return out, run

    def _check_attentions(self) -> None:
        if self.config._attn_implementation != "eager":
            raise ZerodraftError(
                f"output_attentions=True needs attn_implementation='eager', not {self.config._attn_implementation!r}; "
                "load the model with it or call model.set_attn_implementation('eager')."
            )

    def _check_cache(self, cache: Cache, options: CycleOptions, cycles: int) -> None:
        if options.every_cycle:
            raise ZerodraftError("cycle_weights is for training; it cannot be used with a cache.")
        if cache.get_seq_length():
            deepest = max((step.slot for step in self._plan.shared if step.cycle < cycles), default=0)
            if cache.get_seq_length(deepest) != cache.get_seq_length():
                raise ZerodraftError(
                    f"The cache was filled with fewer than {cycles} cycles; use exit_rule=FixedExit(cycles=...) for "
                    "depths that change within a sequence."
                )

    def _stack_mass(self, run: CycleRun) -> Tensor | None:
        masses = [mass for mass in run.masses if mass is not None]
        if not masses:
            return None
        stacked = torch.stack(masses, 2)
        if self.config.schedule == "layer":
            by_layer = stacked.unflatten(2, (self.config.shared_layers, -1))
            return by_layer.transpose(2, 3)
        return stacked.unflatten(2, (-1, self.config.shared_layers))


def _select(states: tuple[Tensor, ...], chosen: Sequence[int]) -> tuple[Tensor | None, ...]:
    """The states of the layers that were run, None in place of those that are not chosen; negative: from the end."""
    kept = {index % len(states) for index in chosen if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))


def _length_of(inputs: Mapping[str, Any]) -> int:
    """The number of tokens that a forward pass gets.

    Raises:
        ZerodraftError: none, or no statement which.
    """
    given = [tokens for name in ("input_ids", "inputs_embeds") if (tokens := inputs.get(name)) is not None]
    if len(given) != 1:
        raise ZerodraftError("Give exactly one of input_ids and inputs_embeds.")
    if given[0].shape[1] == 0:
        raise ZerodraftError("The prompt is empty; give at least one token.")
    return given[0].shape[1]


def _real_tokens(mask: Any, start: int, length: int) -> Bool[Tensor, "b t"] | None:
    """Which of this pass's tokens are no padding; None if the mask does not say or there is none."""
    if isinstance(mask, dict):  # one for each kind of layer, all with the same padding
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    # `generate` prepares these for static caches: a token that may not attend to itself is padding.
    first = min(start, mask.shape[-1] - length)
    own = mask[:, 0, :, first : first + length].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own >= 0
