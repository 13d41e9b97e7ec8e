"""`ZttConfig`: what belongs in `config.json` of a Zero Token Transformer.

The configuration of an existing decoder family is nested under `base_config`; its `num_hidden_layers` is the number of
*stored* layers. Everything that transformers asks of a configuration and that is not declared here (vocabulary size,
heads, sliding window, ...) is answered by the base configuration; the two that follow the unrolled depth, and by which
caches are sized, are `num_hidden_layers` and `layer_types`.

Idea: Li et al., "Efficient Transformer Parameter Reuse via Zero-Token Mechanism", Findings of ACL 2026.
"""

import copy
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import DEEPEST

Schedule = Literal["block", "layer"]
ZeroRope = Literal["origin", "none", "relative"]


# What config.json tells transformers' Auto classes to load, from the file that is saved beside it.
LOADER = "zerodraft_loader"
AUTO_CLASSES = {"AutoConfig": "ZttConfig", "AutoModel": "ZttModel", "AutoModelForCausalLM": "ZttForCausalLM"}


class Step(NamedTuple):
    """One execution of a stored layer: which layer, in which cycle (0-based), and in which KV slot it writes."""

    layer: int
    cycle: int
    slot: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a forward pass asks of the configuration, taken once.

    Every attribute access on a transformers configuration goes through several lookups; a decoding step of a small
    model would spend a tenth of its time on them.
    """

    head: tuple[Step, ...]
    shared: tuple[Step, ...]
    tail: tuple[Step, ...]
    stored_layers: int
    cycles: int
    schedule: str
    zero_rope: str
    ffn_gate: bool
    cycle_lora: bool

    @property
    def head_layers(self) -> int:
        return len(self.head)

    @property
    def shared_layers(self) -> int:
        return self.stored_layers - len(self.head) - len(self.tail)


class ZttConfig(PreTrainedConfig):
    """Configuration of a Zero Token Transformer over any decoder family of transformers.

    Attributes:
        base_config: Configuration of the family whose layers are cycled (Llama, Qwen3, GPT-2, ...).
        head_layers: Layers at the start that are run once. 0 is allowed.
        tail_layers: Layers at the end that are run once. 0 is allowed.
        cycles: How often the shared layers between head and tail are run (N >= 1).
        schedule: `"block"` runs 2345 2345, `"layer"` runs 22 33 44 55.
        zero_tokens: Give the attention of the shared layers a zero token (trainable key, zero value).
        zero_token_start: First cycle (from 1) that has a zero token. 2 leaves the first cycle as the base model has it.
        zero_rope: Rotary position of the zero key. `"origin"`: fixed at position 0. `"none"`: rotated along with the
            query, so that the score does not depend on the position. `"relative"`: one position before each query
            (`"none"` up to a rotation of the key).
        edge_zero_tokens: Zero tokens in the head and tail layers too.
        ffn_gate: Scale the FFN output by one minus the zero-token mass (mean over heads).
        cycle_gates: From the second cycle on, `h + g * (layer(h) - h)` with a trainable `g` per (cycle, layer) that
            starts at zero: the extra cycles begin as the exact identity.
        input_injection: Add the head's output, times a trainable number per cycle, at the start of every cycle but the
            first.
        input_injection_start: Those numbers at first. A deepened model starts from 0, so as to be its base model.
        cycle_scales: Multiply the block's output by a trainable number per cycle, 1 at first.
        residual_streams: Streams that the cycles hand on, mixed by learned numbers between them; 1 for the plain one.
        cycle_lora_rank: Rank of the per-cycle low-rank deltas on the shared layers' projections; 0 for none.
        exit_rule: The early-exit rule found by calibration, as `zerodraft.exit_rule_to_dict` writes it.

    Raises:
        ZerodraftError: head, tail, cycles or one of the choices do not fit the base configuration.
    """

    model_type = "ztt"
    # transformers 5.19, which vLLM 0.32 asks for, reads the first, later ones read the second and make of it what it is
    # declared to be
    sub_configs = {"base_config": AutoConfig}  # pyright: ignore[reportAssignmentType]
    sub_configs_defaults = {"base_config": LlamaConfig}  # pyright: ignore[reportAssignmentType]

    base_config: dict | PreTrainedConfig | None = None
    head_layers: int = 1
    tail_layers: int = 1
    cycles: int = 2
    schedule: str = "block"
    zero_tokens: bool = True
    zero_token_start: int = 1
    zero_rope: str = "origin"
    edge_zero_tokens: bool = False
    ffn_gate: bool = False
    cycle_gates: bool = False
    input_injection: bool = False
    input_injection_start: float = 0.5
    cycle_scales: bool = False
    residual_streams: int = 1
    cycle_lora_rank: int = 0
    exit_rule: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # What older or foreign files repeat at the top level and the base configuration already says.
        for name in ("num_hidden_layers", "layer_types"):
            kwargs.pop(name, None)
        # The attention settings below are written into the base configuration: never into the caller's object.
        self.base_config = copy.deepcopy(self.base_config)
        check_counts(self)  # first: transformers asks for the unrolled depth
        if not isinstance(self.base_config, PreTrainedConfig):
            self.base_config = AutoConfig.for_model(**{"model_type": "llama", **(self.base_config or {})})
        super().__post_init__(**kwargs)
        check_cycling(self)

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, and a file by which programs that did not import this package find it, with
        `trust_remote_code=True`."""
        self.__dict__["auto_map"] = {name: f"{LOADER}.{target}" for name, target in AUTO_CLASSES.items()}
        directory = Path(save_directory)
        if not directory.is_file():  # which transformers complains about
            directory.mkdir(parents=True, exist_ok=True)
            names = ", ".join(sorted(AUTO_CLASSES.values()))
            line = f"from zerodraft import {names}  # noqa: F401  # pip install zerodraft\n"
            (directory / f"{LOADER}.py").write_text(line, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: saved models name the package, they do not take copies of its files along."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from a `config.json`.

        Raises:
            ZerodraftError: it is another kind of model's, which transformers would only warn about.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ZerodraftError(
                f"This is the configuration of a plain {kind} model, not of a Zero Token Transformer: convert the "
                "model with ZttForCausalLM.from_base(MODEL) or 'zerodraft convert MODEL --output DIR', or load it with "
                "AutoModelForCausalLM."
            )
        return super().from_dict(config_dict, **kwargs)

    # -- the base configuration answers for everything that is not declared here ----------------------------------

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base_config")
        if name.startswith("_") or not isinstance(base, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        values = getattr(base, name)
        if name in ("layer_types", "kv_sharing_modes") and values is not None:  # one entry for each slot of a cache
            return [values[step.layer] for step in self.steps()]
        return values

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_config")
        own = name.startswith("_") or hasattr(type(self), name) or name in self.__dict__
        if not own and isinstance(base, PreTrainedConfig) and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    # -- the unrolled model ---------------------------------------------------------------------------------------

    @property
    def family(self) -> PreTrainedConfig:
        """The base configuration, which is an object once this one has been made."""
        assert isinstance(self.base_config, PreTrainedConfig)
        return self.base_config

    @property
    def stored_layers(self) -> int:
        """Layers that have weights of their own: head + shared + tail."""
        return self.family.num_hidden_layers

    @property
    def shared_layers(self) -> int:
        """Layers between head and tail, run `cycles` times."""
        return self.stored_layers - self.head_layers - self.tail_layers

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the unrolled model, and the number of KV slots that a cache needs."""
        return self.head_layers + self.cycles * self.shared_layers + self.tail_layers

    def steps(self) -> list[Step]:
        """Every execution of a stored layer in order; `slot` counts them from 0."""
        head, shared = self.head_layers, range(self.head_layers, self.head_layers + self.shared_layers)
        if self.schedule == "block":
            middle = [(layer, cycle) for cycle in range(self.cycles) for layer in shared]
        else:
            middle = [(layer, cycle) for layer in shared for cycle in range(self.cycles)]
        tail = [(layer, 0) for layer in range(head + self.shared_layers, self.stored_layers)]
        order = [(layer, 0) for layer in range(head)] + middle + tail
        return [Step(layer, cycle, slot) for slot, (layer, cycle) in enumerate(order)]

    def plan(self) -> Plan:
        """The steps by part, and what a forward pass asks beside them."""
        steps = self.steps()
        head, tail = self.head_layers, len(steps) - self.tail_layers
        return Plan(
            head=tuple(steps[:head]),
            shared=tuple(steps[head:tail]),
            tail=tuple(steps[tail:]),
            stored_layers=self.stored_layers,
            cycles=self.cycles,
            schedule=self.schedule,
            zero_rope=self.zero_rope,
            ffn_gate=self.ffn_gate,
            cycle_lora=self.cycle_lora_rank > 0,
        )

    def is_shared(self, layer: int) -> bool:
        """Whether a stored layer is one of those that are cycled."""
        return self.head_layers <= layer < self.head_layers + self.shared_layers


def check_counts(config: ZttConfig) -> None:
    """Raise `ZerodraftError` unless the numbers of layers and cycles are such numbers at all."""
    for name, least in (
        ("head_layers", 0),
        ("tail_layers", 0),
        ("cycles", 1),
        ("residual_streams", 1),
        ("cycle_lora_rank", 0),
    ):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ZerodraftError(f"{name}={value!r} must be a whole number of at least {least}.")
    base = config.base_config
    stored = base.get("num_hidden_layers") if isinstance(base, dict) else getattr(base, "num_hidden_layers", None)
    if config.cycles * (max(stored, 1) if isinstance(stored, int) else 1) > DEEPEST:
        raise ZerodraftError(
            f"cycles={config.cycles} of {stored} layers are more than {DEEPEST:,} layers, as deep as models are made."
        )


def check_cycling(config: ZttConfig) -> None:
    """Raise `ZerodraftError` unless head, tail, cycles and choices fit the base configuration."""
    stored = getattr(config.family, "num_hidden_layers", None)
    if not isinstance(stored, int):
        raise ZerodraftError(
            f"The base configuration ({config.family.model_type!r}) has no num_hidden_layers; expected the text "
            "configuration of a decoder-only model."
        )
    if config.head_layers + config.tail_layers > stored or (config.shared_layers == 0 and config.cycles > 1):
        raise ZerodraftError(
            f"head_layers={config.head_layers} and tail_layers={config.tail_layers} leave no layer to cycle in a model "
            f"of {stored} stored layers; choose them so that their sum is below {stored}."
        )
    if "reuse" in (getattr(config.family, "kv_sharing_modes", None) or ()):
        raise ZerodraftError(
            f"Layers of this {config.family.model_type!r} model attend to the keys and values of earlier ones "
            "(num_kv_shared_layers), which cycles do not support; only models without such layers can be cycled."
        )
    for name in ("zero_tokens", "edge_zero_tokens", "ffn_gate", "cycle_gates", "input_injection", "cycle_scales"):
        if not isinstance(getattr(config, name), bool):
            raise ZerodraftError(f"{name}={getattr(config, name)!r} must be true or false.")
    for name, choices in (("schedule", get_args(Schedule)), ("zero_rope", get_args(ZeroRope))):
        if getattr(config, name) not in choices:
            raise ZerodraftError(f"{name}={getattr(config, name)!r} is unknown; choose one of {', '.join(choices)}.")
    parts = {"input_injection": config.input_injection, "cycle_scales": config.cycle_scales}
    for name, chosen in (parts | {"residual_streams": config.residual_streams > 1}).items():
        if chosen and config.schedule != "block":
            raise ZerodraftError(f'{name} needs schedule="block": with "layer" the cycles have no start and no end.')
    start = config.input_injection_start
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not abs(start) < math.inf:
        raise ZerodraftError(f"input_injection_start={start!r} must be a finite number.")
    if not isinstance(config.exit_rule, (dict, type(None))):
        raise ZerodraftError(f"exit_rule={config.exit_rule!r} is not one that 'zerodraft calibrate' writes.")
    if type(config.zero_token_start) is not int or not 1 <= config.zero_token_start <= config.cycles + 1:
        raise ZerodraftError(
            f"zero_token_start={config.zero_token_start!r} must lie between 1 and cycles + 1 = {config.cycles + 1}."
        )
