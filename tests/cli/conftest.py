"""Tiny models on disk, each with a tokenizer, for tests of whole commands."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zerodraft import ZttConfig, ZttForCausalLM
from zerodraft.training.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat. once upon a time there was a little fox who could not sleep."


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([TEXT] * 4, 300)


@pytest.fixture(scope="session")
def family_config(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def ztt_dir(tmp_path_factory: pytest.TempPathFactory, family_config: LlamaConfig, tokenizer: Any) -> Path:
    """A Zero Token Transformer of three cycles."""
    torch.manual_seed(0)
    return saved(ZttForCausalLM(ZttConfig(base_config=family_config, cycles=3)), tokenizer, tmp_path_factory, "ztt")


@pytest.fixture(scope="session")
def plain_dir(tmp_path_factory: pytest.TempPathFactory, family_config: LlamaConfig, tokenizer: Any) -> Path:
    """A plain Llama of four layers."""
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(family_config), tokenizer, tmp_path_factory, "plain")


def saved(model: Any, tokenizer: Any, factory: pytest.TempPathFactory, name: str) -> Path:
    path = factory.mktemp(name)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
