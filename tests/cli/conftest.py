"""Tiny models on disk for the tests of commands."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.saved import save, save_completions, save_ztt, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def ztt_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Zero Token Transformer of three cycles."""
    return save_ztt(tmp_path_factory.mktemp("ztt"), tokenizer)


@pytest.fixture(scope="session")
def plain_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A plain Llama of four layers."""
    torch.manual_seed(0)
    return save(LlamaForCausalLM(tiny_llama(tokenizer)), tokenizer, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def completions(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten greedy completions of the plain Llama."""
    return save_completions(
        tmp_path_factory.mktemp("completions"), AutoModelForCausalLM.from_pretrained(plain_dir), 10, 16
    )
