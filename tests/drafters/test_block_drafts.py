"""Block-diffusion drafts through `generate`: among four tokens they are accepted often, and sampled ones exactly."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.decoding.test_engine import NEW, OPTIONS, PROMPT, Enumerator, V, distance, exact, model_of, settings
from tests.ztt.tiny import left_padded
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.search import SearchConfig
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.fast.lean import lean_target
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.models.resolve import resolve

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "smollm2-drafter"

KINDS: dict[str, dict[str, Any]] = {
    "path": {"tree": False},
    "tree": {"search": SearchConfig(tau=1.0, beam=4)},
    "sampled path": {"tree": False, "sample_drafts": True},
    "sampled tree": {"sample_drafts": True, "search": SearchConfig(tau=1.0, beam=2)},
}


def talkative() -> Any:
    """A target whose greedy texts go on changing."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=V, bos_token_id=None, eos_token_id=None, initializer_range=1.0, **sizes)
    return LlamaForCausalLM(config).eval()


def drafter_for(target: Any, coupling: int) -> BlockDrafter:
    """A drafter of random weights: with four tokens it is right now and then, and never sure."""
    torch.manual_seed(1)
    model = drafter_from_target(target, num_layers=1, block_size=4, coupling=coupling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return BlockDrafter(model, target, candidates=V)


@pytest.mark.parametrize("coupling", [0, 4])
@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", ["path", "tree"])
def test_greedy_tokens_are_those_of_generate(kind: str, lean: bool, coupling: int) -> None:
    target = talkative()
    generator = torch.Generator().manual_seed(3)
    padded = left_padded([torch.randint(V, (n,), generator=generator) for n in (9, 4, 6)])
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for rows in (1, 3):
        batch = {name: padded[name][:rows] for name in ("input_ids", "attention_mask")}
        plain = target.generate(**batch, **options)
        assert ((plain[:, -40:-1] != plain[:, -39:]).sum(1) > 10).all()
        spec = DiffuSpec(
            drafter_for(target, coupling),
            length=FixedLength(3),
            make_target=lean_target if lean else None,
            **KINDS[kind],
        )
        assert torch.equal(plain, target.generate(**batch, custom_generate=spec, **options))
        assert spec.last_stats is not None
        assert spec.last_stats.accepted > 5


@pytest.mark.parametrize("coupling", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_tokens_have_the_distribution_of_plain_sampling(kind: str, coupling: int) -> None:
    target, options = model_of(), OPTIONS["top_k"]
    drafter, enumerator = drafter_for(target, coupling), Enumerator()

    def outcome() -> tuple[int, ...]:
        spec = DiffuSpec(drafter, dice=enumerator, length=FixedLength(1), **KINDS[kind])
        out = target.generate(PROMPT, custom_generate=spec, **settings(options))
        return tuple(out[0, PROMPT.shape[1] :].tolist())

    found = enumerator.run(outcome)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert distance(found, exact(target, options)) < 1e-5


@pytest.mark.parametrize("kind", ["sampled path", "sampled tree"])
def test_rows_of_a_batch_are_sampled_from_it_too(kind: str) -> None:
    """Longer drafts than can be enumerated."""
    target, options, rows = model_of(), OPTIONS["top_k"], 160
    expected = exact(target, options)
    spec = DiffuSpec(
        drafter_for(target, 4),
        length=FixedLength(3),
        generator=torch.Generator().manual_seed(0),
        **KINDS[kind],
    )
    out = target.generate(PROMPT, num_return_sequences=rows, custom_generate=spec, **settings(options))
    counts = Counter(tuple(row) for row in out[:, PROMPT.shape[1] :].tolist())
    assert set(counts) <= set(expected)
    assert len(expected) == 2**NEW
    chi2 = sum((counts[key] - rows * chance) ** 2 / (rows * chance) for key, chance in expected.items())
    # mean of chi-square plus five standard deviations
    assert chi2 < len(expected) + 5 * (2 * len(expected)) ** 0.5


@pytest.mark.real_model
def test_the_shipped_drafter_writes_the_same_tokens() -> None:
    path = resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**prompt, **options)
    drafter = BlockDrafter.from_pretrained(SHIPPED, model)
    for kind in ("path", "tree"):
        spec = DiffuSpec(drafter, length=FixedLength(drafter.max_length), **KINDS[kind])
        assert torch.equal(plain, model.generate(**prompt, custom_generate=spec, **options))
        assert spec.last_stats is not None
        assert spec.last_stats.mat > 1.3
