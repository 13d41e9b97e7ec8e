"""Block drafts among four tokens: they are accepted often, and what can be sampled can be enumerated."""

from collections import Counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.decoding.enumerating import NEW, OPTIONS, PROMPT, Enumerator, V, distance, exact, model_of, settings
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.search import SearchConfig
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.generate.huggingface import DiffuSpec

CPU = torch.device("cpu")
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


def drafter_for(target: Any, coupling: int, device: torch.device = CPU) -> BlockDrafter:
    """A drafter of random weights: with four tokens it is right now and then, and never sure. The target, on the CPU
    until now, goes to the device with it."""
    torch.manual_seed(1)
    model = drafter_from_target(target, num_layers=1, block_size=4, coupling=coupling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return BlockDrafter(model, target.to(device), candidates=V)


def check_enumerated(kind: str, coupling: int, device: torch.device = CPU) -> float:
    """Whether drafts leave the distribution of plain sampling as it is; the largest difference of a probability."""
    target, options, enumerator = model_of(), OPTIONS["top_k"], Enumerator()
    drafter = drafter_for(target, coupling, device)

    def outcome() -> tuple[int, ...]:
        spec = DiffuSpec(drafter, dice=enumerator, length=FixedLength(1), **KINDS[kind])
        out = target.generate(PROMPT.to(device), custom_generate=spec, **settings(options))
        return tuple(out[0, PROMPT.shape[1] :].tolist())

    found = enumerator.run(outcome)
    assert abs(sum(found.values()) - 1) < 1e-5
    apart = distance(found, exact(target, options))
    assert apart < 1e-5, apart
    return apart


def check_rolled(kind: str, generator: torch.Generator | None, device: torch.device = CPU) -> dict[str, float]:
    """Chi-square over a batch of equal prompts, with longer drafts than can be enumerated; without a generator the dice
    are torch's own."""
    target, options, rows = model_of(), OPTIONS["top_k"], 160
    drafter, expected = drafter_for(target, 4, device), exact(target, options)
    assert len(expected) == 2**NEW
    torch.manual_seed(0)
    spec = DiffuSpec(drafter, length=FixedLength(3), generator=generator, **KINDS[kind])
    out = target.generate(PROMPT.to(device), num_return_sequences=rows, custom_generate=spec, **settings(options))
    counts = Counter(tuple(row) for row in out[:, PROMPT.shape[1] :].tolist())
    assert set(counts) <= set(expected)
    chi2 = sum((counts[key] - rows * chance) ** 2 / (rows * chance) for key, chance in expected.items())
    # mean of chi-square plus five standard deviations
    assert chi2 < len(expected) + 5 * (2 * len(expected)) ** 0.5, chi2
    return {"chi2": chi2, "outcomes": len(expected)}
