"""Zero Token Transformers in vLLM write what they write here."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins.vllm.serving import PROMPTS, engine, written
from tests.ztt.tiny import base_config, tiny
from zerodraft import ZerodraftError, ZttForCausalLM

MODELS = Path(__file__).resolve().parents[3] / "models"

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),  # its own
]


@torch.no_grad()
def ours(model: Any, prompt: list[int], tokens: int, **options: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of `generate`, and the log-probability of each."""
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    chances = model(ids, **options).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    new = ids[0, len(prompt) :]
    return new.tolist(), chances.gather(-1, new[:, None])[:, 0]


def assert_same(path: Path, model: Any, tokens: int = 24, options: Any = None, **settings: Any) -> None:
    """vLLM and `generate` write the same tokens, to the prompts in one batch, with the same probabilities."""
    with engine(path, **settings) as llm:
        outs = written(llm, tokens=tokens, logprobs=1)
    for prompt, out in zip(PROMPTS, outs, strict=True):
        expected, chances = ours(model, prompt, tokens, **options or {})
        assert list(out.token_ids) == expected
        theirs = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(theirs), chances, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["ztt-million", "ztt-million-exits", "vanilla-million"])
def test_shipped_models(name: str) -> None:
    assert_same(MODELS / name, ZttForCausalLM.from_pretrained(MODELS / name), tokens=60)


# vLLM's kernels have few sizes of heads, and without zero tokens nothing is padded
PLAIN = base_config("llama", head_dim=32)
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"cycle_gates": True}),
    "qwen2": ("qwen2", {"zero_rope": "none", "cycle_scales": True, "zero_token_start": 2}),
    "qwen3": ("qwen3", {"zero_rope": "relative", "input_injection": True, "edge_zero_tokens": True}),
    "without": ("llama", {"base": PLAIN, "zero_tokens": False, "head_layers": 0}),
    "layer": ("qwen3", {"schedule": "layer", "cycle_gates": True}),
    "no-edges": (
        "llama",
        {"head_layers": 0, "tail_layers": 0, "input_injection": True, "cycle_scales": True, "cycle_gates": True},
    ),
}


@pytest.mark.parametrize("case", RANDOM)
def test_random_models(case: str, tmp_path: Path) -> None:
    family, options = RANDOM[case]
    model = tiny(family, **options)
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, model)


def test_fewer_cycles_than_stored(tmp_path: Path) -> None:
    model = tiny("llama", cycle_gates=True, input_injection=True, cycle_scales=True)
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, model, options={"cycles": 2}, hf_overrides={"cycles": 2})


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(ZerodraftError) as refused, engine(path, **settings):
        pass
    return str(refused.value)


def test_what_is_not_computed_is_refused(tmp_path: Path) -> None:
    tiny("llama", ffn_gate=True, cycle_lora_rank=2).save_pretrained(tmp_path / "parts")
    tiny("smollm3").save_pretrained(tmp_path / "family")
    tiny("llama", cycle_gates=True).save_pretrained(tmp_path / "cycles")
    assert "This model has ffn_gate and cycle_lora_rank, which" in refusal(tmp_path / "parts")
    assert "a base model of the kind 'smollm3', which" in refusal(tmp_path / "family")
    assert "residual_streams, which" in refusal(tmp_path / "cycles", hf_overrides={"residual_streams": 4})
    assert "cycles=4 are more than the 3 that" in refusal(tmp_path / "cycles", hf_overrides={"cycles": 4})
    assert "cycles=0 must be" in refusal(tmp_path / "cycles", hf_overrides={"cycles": 0})
