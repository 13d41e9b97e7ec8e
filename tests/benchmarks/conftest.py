"""A plan of two arms that trains in a second."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evidence_plan import Plan, read_plan

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "small", "models", "learn")

PLAN = """
table: tiny
title: Two arms
baseline: vanilla
seeds: [0, 1]
rates: {"1e-2": {learning_rate: 1e-2}}
arms:
  vanilla: {model: {cycles: 1, zero_tokens: false}}
  ztt: {}
recipe:
  model: {family: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3, num_attention_heads: 2,
    num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 32}
  tokenizer: {vocab_size: 280}
  data: {train: [OUT/text.txt], evaluation: {other: OUT/other.txt}, context_length: 16, cache: OUT/cache,
    validation_fraction: 0.1, document_chars: 200, validation_blocks: 4}
  training: {steps: 6, batch_size: 2, warmup_steps: 2, save_every: 2, use_cpu: true, tensorboard: false}
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Callable[..., Path]:
    """`plan_file(seeds=[0], recipe={...})`: a plan's file, with other values for its keys; sections are joined."""
    draw = random.Random(0)
    for name, paragraphs in (("text", 40), ("other", 5)):
        text = "\n\n".join(" ".join(draw.choices(WORDS, k=30)) for _ in range(paragraphs))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(PLAN.replace("OUT", str(tmp_path)), encoding="utf-8")

    def write(**values: Any) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({"extends": "tiny.yaml", **values}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_plan(plan_file: Callable[..., Path]) -> Callable[..., Plan]:
    """The plan of `plan_file`."""
    return lambda **values: read_plan(plan_file(**values))
