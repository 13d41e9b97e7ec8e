"""A tiny target with a block drafter, and prompts of three tasks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.saved import save_block, save_dflash, save_target

WORDS = ["the", "cat", "sat", "on", "the", "mat", "once", "upon", "a", "time", "there", "was", "a", "little", "fox"]


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def drafter_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("drafter")
    save_block(LlamaForCausalLM.from_pretrained(target_dir), folder, layers=2)
    return folder


@pytest.fixture(scope="session")
def dflash_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dflash") / "model"
    save_dflash(LlamaForCausalLM.from_pretrained(target_dir), folder)
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
