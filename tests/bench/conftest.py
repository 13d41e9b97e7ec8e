"""A tiny target with a block drafter, and prompts of three tasks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.saved import save, tiny_llama, tiny_tokenizer
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.drafters.dflash_files import export_dflash
from zerodraft.drafters.dflash_model import dflash_from_target

WORDS = ["the", "cat", "sat", "on", "the", "mat", "once", "upon", "a", "time", "there", "was", "a", "little", "fox"]


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = tiny_llama(tokenizer)
    config.initializer_range = 0.2  # else it would say one token for ever
    return save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def drafter_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("drafter")
    drafter_from_target(LlamaForCausalLM.from_pretrained(target_dir), num_layers=2, block_size=4).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def dflash_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that transformers' DFlash runtime can use."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dflash") / "model"
    target = LlamaForCausalLM.from_pretrained(target_dir)
    export_dflash(dflash_from_target(target, num_layers=1, block_size=4, taps=2, mask_token_id=3), folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts, two of each task."""
    file = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    rows = [
        {"question_id": n, "category": category, "turns": [" ".join(WORDS[n : n + 5] * 2), "never asked"]}
        for n, category in enumerate(("writing", "qa", "math", "rag", "qa", "rag"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
