"""A tiny corpus and a recipe that trains on it in a second."""

import random

import pytest

from zerodraft.training.recipe import load_recipe

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "small",
    "models",
    "learn",
    "to",
    "read",
]

RECIPE = """
output: OUT/run
seed: 3
model: {family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 2,
  num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 64, cycles: 2}
tokenizer: {vocab_size: 300}
data: {train: [OUT/text], context_length: 32, cache: OUT/cache, validation_fraction: 0.1, document_chars: 200}
loss: {kind: sampled, token_depths: 0.3}
training: {steps: 8, batch_size: 2, warmup_steps: 2, learning_rate: 0.01, log_every: 3, use_cpu: true, tensorboard:
    false}
"""


@pytest.fixture
def make_recipe(tmp_path):
    """`make_recipe("training.steps=3", ...)`: the tiny recipe with overrides; its text is in `tmp_path / "text"`."""
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(4):
        paragraphs = [" ".join(draw.choices(WORDS, k=30)) for _ in range(20)]
        (tmp_path / "text" / f"{number}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path)), encoding="utf-8")
    return lambda *overrides: load_recipe(path, overrides)
