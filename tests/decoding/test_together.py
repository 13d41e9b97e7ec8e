"""The drafters, proxies and targets of the package in one engine: the tokens and the distribution are the target's."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.enumerating import NEW, OPTIONS, PROMPT, V, exact, model_of, settings
from tests.drafters.test_block import make
from tests.ztt.tiny import left_padded
from zerodraft import (
    AutoregressiveDrafter,
    ContextProxy,
    CostAwareLength,
    CostAwareTree,
    DiffuSpec,
    FixedLength,
    HybridDrafter,
    PromptLookupDrafter,
    SearchConfig,
)
from zerodraft.decoding.costs import CostKind, Costs
from zerodraft.drafters.block import BlockDrafter
from zerodraft.fast.lean import lean_target

DRAFTERS: dict[str, Any] = {
    "block": lambda target, block: BlockDrafter(block, target, candidates=6),
    "lookup": lambda target, block: PromptLookupDrafter(),
    "hybrid": lambda target, block: HybridDrafter(other=BlockDrafter(block, target, candidates=6), least_gain=0.1),
    "autoregressive": lambda target, block: AutoregressiveDrafter(target, max_length=5),
    "other": lambda target, block: AutoregressiveDrafter(make("qwen3")[0], max_length=4),
}


class KnownCosts(Costs):
    """Whatever the clock says, lengths follow from acceptance alone, and a node more takes a twentieth of a pass."""

    def observe(self, kind: CostKind, k: int, seconds: float) -> None:
        super().observe(kind, k, {"draft": 1e-4, "verify": 1e-3, "score": 1e-3 * (1 + k / 20)}[kind])


# made anew for each test, since a controller remembers what it has seen
OPTIONS_OF_SPEC: dict[str, Callable[[], dict[str, Any]]] = {
    "published": lambda: {"fallback": False},
    "as it comes": dict,
    "proxy": lambda: {"proxy": ContextProxy(64), "length": FixedLength(4)},
    "best first": lambda: {
        "search": SearchConfig(expand="best_first", budget=7),
        "length": CostAwareLength(k_max=5),
        "fallback": False,
    },
    "by cost": lambda: {
        "search": SearchConfig(tau=1, expand="best_first", budget=9),
        "length": CostAwareTree(k=6),
        "fallback": False,
    },
    "lean": lambda: {"make_target": lean_target, "length": FixedLength(3)},
}


def batch_of(rows: int) -> dict[str, Tensor]:
    """Prompts that repeat themselves, so that lookups find something."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(3, 64, (4 + n,), generator=generator) for n in range(rows)]
    batch = left_padded([part.repeat(3) for part in parts])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OPTIONS_OF_SPEC)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_tokens_are_those_of_generate(drafter: str, name: str, rows: int) -> None:
    target, block = make("llama")
    batch = batch_of(rows)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 9, "pad_token_id": 0}
    plain = target.generate(**batch, **options)
    spec = DiffuSpec(DRAFTERS[drafter](target, block), **OPTIONS_OF_SPEC[name]())
    spec.costs = KnownCosts()
    assert torch.equal(plain, target.generate(**batch, custom_generate=spec, **options))
    assert spec.last_stats is not None
    if drafter == "autoregressive" and name != "as it comes":
        assert spec.last_stats.mat > 1.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_autoregressive_draft_is_sampled_exactly(temperature: float) -> None:
    """The drafter has the right distribution of another temperature: drafts are often, not always, accepted."""
    model, options, rows = model_of(), OPTIONS["top_k"], 200
    expected = exact(model, options)
    drafter = AutoregressiveDrafter(model, candidates=V, max_length=2, temperature=temperature)
    spec = DiffuSpec(
        drafter,
        sample_drafts=True,
        length=FixedLength(2),
        search=SearchConfig(tau=1.0, beam=2),
        generator=torch.Generator().manual_seed(0),
    )
    out = model.generate(PROMPT, num_return_sequences=rows, custom_generate=spec, **settings(options))
    counts = Counter(tuple(row) for row in out[:, PROMPT.shape[1] :].tolist())
    assert set(counts) <= set(expected)
    chi2 = sum((counts[key] - rows * chance) ** 2 / (rows * chance) for key, chance in expected.items())
    assert len(expected) == 2**NEW
    # mean of chi-square plus five standard deviations
    assert chi2 < len(expected) + 5 * (2 * len(expected)) ** 0.5
