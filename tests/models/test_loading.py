"""Damaged checkpoints of converted models are one clear sentence; how many positions a model has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedConfig, XLNetConfig

from tests.ztt.tiny import tiny_plain
from zerodraft import ZerodraftError, ZttConfig
from zerodraft.models.loading import context_of, eos_ids, load_pretrained
from zerodraft.ztt.convert import from_base


@pytest.mark.parametrize("damage", ["truncated", "missing", "misshapen", "nan", "config"])
def test_damaged_checkpoints(tmp_path: Path, damage: str) -> None:
    from_base(tiny_plain(), cycles=2).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "missing":
        del weights["zero_tokens.keys"]
    elif damage == "misshapen":
        weights["zero_tokens.keys"] = torch.zeros(7, 1, 2, 8)
    elif damage == "nan":
        weights["cycle_gates"][0, 0] = float("nan")
    else:
        (tmp_path / "config.json").write_text("{")
    if damage in ("missing", "misshapen", "nan"):
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ZerodraftError) as raised:
        load_pretrained(AutoModelForCausalLM, tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (ZttConfig(base_config=LlamaConfig(max_position_embeddings=77)), 77),
        (BloomConfig(), None),
        (XLNetConfig(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_of_a_model(config: PreTrainedConfig, positions: int | None) -> None:
    assert context_of(config) == positions


@pytest.mark.parametrize(("given", "ids"), [(7, {7}), ([7, 9], {7, 9}), (None, set()), ([], set())])
def test_tokens_that_end_a_text(given: int | list[int] | None, ids: set[int]) -> None:
    model = tiny_plain()
    model.generation_config.eos_token_id = given
    assert eos_ids(model) == ids
