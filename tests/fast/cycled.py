"""Tiny Zero Token Transformers over every family of the lean path, for its tests; each option is in one of them."""

from collections.abc import Callable
from typing import Any

from tests.ztt.tiny import base_config, randomise, tiny, tiny_plain
from zerodraft import ZttForCausalLM
from zerodraft.ztt.convert import from_base

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SOME_WINDOWS = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}


def over(family: str, changes: dict[str, Any] | None = None, **options: Any) -> ZttForCausalLM:
    # the kernels take heads of 16, 32, ...
    return tiny(family, base=base_config(family, head_dim=16, **(changes or {})), **options)


def converted(family: str, *, trained: bool, **options: Any) -> ZttForCausalLM:
    """A converted plain model: as `from_base` makes it, or with gates, zero tokens and weights moved."""
    model = from_base(tiny_plain(family, head_dim=16), **options)
    if trained:
        randomise(model, seed=3)
    return model


CYCLED: dict[str, Callable[[], ZttForCausalLM]] = {
    "cycled llama": lambda: over("llama"),
    "cycled llama, one cycle": lambda: over("llama", cycles=1),
    "cycled mistral, window of 5, no head and tail": lambda: over("mistral", head_layers=0, tail_layers=0, cycles=2),
    "cycled qwen2, some windows, by layer": lambda: over("qwen2", SOME_WINDOWS, head_layers=0, schedule="layer"),
    "cycled qwen3, keys turned": lambda: over("qwen3", zero_rope="none", tail_layers=2),
    "cycled llama, keys turned, yarn": lambda: over("llama", {"rope_parameters": YARN}, zero_rope="none"),
    "cycled llama, keys one position before, yarn": lambda: over(
        "llama", {"rope_parameters": YARN}, zero_rope="relative"
    ),
    "cycled mistral, keys one position before": lambda: over("mistral", zero_rope="relative", zero_token_start=3),
    "cycled qwen2, gates, no tail": lambda: over("qwen2", cycle_gates=True, zero_token_start=2, tail_layers=0),
    "cycled llama, edges, FFN gate, biases": lambda: over(
        "llama", {"mlp_bias": True, "attention_bias": True}, edge_zero_tokens=True, ffn_gate=True
    ),
    "cycled qwen3, FFN gate, keys turned": lambda: over("qwen3", ffn_gate=True, zero_rope="none", zero_token_start=2),
    "cycled qwen3, gates alone": lambda: over("qwen3", zero_tokens=False, cycle_gates=True),
    "cycled llama, nothing added": lambda: over("llama", zero_tokens=False, ffn_gate=True),
    "cycled llama, fed again": lambda: over("llama", input_injection=True),
    "cycled qwen3, fed again and scaled, gates": lambda: over(
        "qwen3", input_injection=True, cycle_scales=True, cycle_gates=True, ffn_gate=True
    ),
    "cycled llama, fed again and scaled, gates, keys turned": lambda: over(
        "llama", input_injection=True, cycle_scales=True, cycle_gates=True, zero_rope="none"
    ),
    "cycled qwen2, fed again and scaled, no head and tail": lambda: over(
        "qwen2", input_injection=True, cycle_scales=True, zero_tokens=False, head_layers=0, tail_layers=0
    ),
    "deepened mistral": lambda: converted("mistral", trained=False, cycles=3),
    "deepened qwen3, trained": lambda: converted("qwen3", trained=True),
    "deepened llama, one cycle": lambda: converted("llama", trained=True, cycles=1),
    "compressed qwen2": lambda: converted("qwen2", trained=True, mode="compress", zero_rope="relative"),
}
