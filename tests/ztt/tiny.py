"""Tiny random models of the families that must work, for the tests of the Zero Token Transformer.

Weights, norms, zero keys, gates and LoRA are all random and large enough to matter: a test in which one of them could
be left out unnoticed would prove nothing.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from zerodraft import ZttConfig, ZttForCausalLM

LAYERS = 4
VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=4,
        layer_types=WINDOWS,
        query_pre_attn_scalar=8,
        final_logit_softcapping=20.0,
    ),
    "olmo2": Olmo2Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0]),
    "gpt2": GPT2Config(**GPT2_SIZES, scale_attn_by_inverse_layer_idx=True),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}


def base_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A fresh configuration of a family."""
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every weight away from its initial value, the zero keys far enough for masses from near 0 to near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        scale = 1.5 if "zero_tokens" in name else 0.5 if "cycle_gates" in name else 0.12
        weight.add_(scale * torch.randn(weight.shape, generator=generator).to(weight))


def tiny(
    family: str = "llama", *, seed: int = 0, base: PreTrainedConfig | None = None, **options: Any
) -> ZttForCausalLM:
    """A random Zero Token Transformer over a family, in evaluation mode; three cycles unless told otherwise."""
    config = ZttConfig(base_config=base or base_config(family), **{"cycles": 3, **options})
    torch.manual_seed(seed)
    model = ZttForCausalLM(config).eval()
    randomise(model, seed)
    return model


def tiny_plain(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random plain model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(base_config(family, **changes)).eval()
    randomise(model, seed)
    return model


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths as one left-padded batch: `input_ids`, `attention_mask` and `position_ids`."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.float() - b.float()).abs().max().item()


def unpositioned(family: str) -> PreTrainedConfig:
    """The family's configuration without what depends on a layer's position."""
    changes = {"scale_attn_by_inverse_layer_idx": False} if family == "gpt2" else {}
    return base_config(family, **changes)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model says to `tokens()`."""
    return model(tokens()).logits


@torch.no_grad()
def open_gates(model: ZttForCausalLM, value: float) -> None:
    """Set all cycle gates."""
    assert model.cycle_gates is not None
    model.cycle_gates.weight.fill_(value)
