"""Tiny targets with DFlash drafters of random weights, for the tests of the network, its decoding and its files."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_files import export_dflash
from zerodraft.drafters.dflash_model import (
    DFlashConfig,
    DFlashModel,
    dflash_from_target,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


TARGETS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


MASK = 63


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}


def make(family: str = "llama", block_size: int = 4, **changes):
    """A target and a drafter with random weights."""
    torch.manual_seed(0)
    target = TARGETS[family]().eval()
    drafter = dflash_from_target(target, num_layers=2, block_size=block_size, taps=3, mask_token_id=MASK)
    if changes:
        drafter = DFlashModel(DFlashConfig(**(drafter.config.to_dict() | changes))).bind(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return target, drafter.eval()


def states(target, drafter: DFlashModel, ids: Tensor) -> Tensor:
    hidden = target(ids, output_hidden_states=True).hidden_states
    return torch.stack([hidden[i + 1] for i in drafter.config.target_layer_ids], dim=2)


def logits_plainly(target, drafter: DFlashModel, ids: Tensor, taps: Tensor) -> Tensor:
    """The head's logits of one block after `ids`, whose last token has no states yet."""
    n = taps.shape[1]
    assert ids.shape[1] == n + 1
    embedding = target.get_input_embeddings().weight[ids[:, -1:]]
    hidden = drafter(taps, torch.ones(1, n, dtype=torch.bool), torch.tensor([[n - 1]]), embedding)
    return target.get_output_embeddings()(hidden[0, 0])


def draft_plainly(target, drafter: DFlashModel, ids: Tensor, taps: Tensor) -> Tensor:
    """Log-probabilities of it."""
    return logits_plainly(target, drafter, ids, taps).log_softmax(-1)


def draft_once(drafter: DFlashDrafter, ids: Tensor, taps: Tensor) -> Lattice:
    """Three tokens after `ids`."""
    session = drafter.start(1, torch.device("cpu"), None)
    session.observe([Progress(ids[0], taps[0])])
    return session.propose([3])[0]


def transformers_model(drafter: DFlashModel, folder: Path):
    export_dflash(drafter, folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert type(model).__name__ == "MuseGlimmerAssistantModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()
