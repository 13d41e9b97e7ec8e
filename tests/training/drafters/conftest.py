"""A tiny target, whose size the module says, and what it writes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.saved import save_completions


@pytest.fixture(scope="module")
def target_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=request.module.VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=request.module.LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(target_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(target_folder).eval()


@pytest.fixture(scope="module")
def completions_folder(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_completions(tmp_path_factory.mktemp("completions"), target, 12, 20)
