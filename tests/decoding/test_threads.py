"""One model and one decoder shared by the threads of a server: each call gets its own text."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.decoding.test_together import DRAFTERS
from tests.drafters.test_block import make
from zerodraft import (
    AdaptiveLength,
    ContextProxy,
    CostAwareLength,
    CostAwareTree,
    DiffuSpec,
    FixedLength,
    release,
)

LENGTHS: dict[str, Callable[[], Any]] = {
    "adaptive": lambda: AdaptiveLength(k_min=2, k_max=6),
    "fixed": lambda: FixedLength(3),
    "costs": lambda: CostAwareLength(k_max=6),
    "tree": lambda: CostAwareTree(k=5),
}
CALLS, NEW = 12, 8


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("make_target", ["auto", None])
@pytest.mark.parametrize(
    ("drafter", "length"), list(zip([*DRAFTERS, "lookup"], [*LENGTHS, "costs", "tree"], strict=True))
)
def test_threads_share_a_decoder(drafter: str, length: str, make_target: Any) -> None:
    model, block = make("llama")
    prompts = [torch.tensor([[3 + n, 20 + n, 3 + n, 20 + n, 7, 3 + n]]) for n in range(CALLS // 3)]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    right = [model.generate(prompt, **options) for prompt in prompts]
    proxy = ContextProxy(64) if length == "fixed" else None
    spec = DiffuSpec(DRAFTERS[drafter](model, block), length=LENGTHS[length](), make_target=make_target, proxy=proxy)

    def answer(n: int) -> torch.Tensor:
        prompt = prompts[n % len(prompts)]
        return model.generate(prompt, custom_generate=spec, **options)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(answer, range(CALLS)))
    for n, found in enumerate(answers):
        assert torch.equal(found, right[n % len(right)])
    assert spec.last_stats is not None
    assert spec.last_stats.new_tokens == NEW
    release(model)


def test_steps_of_two_texts_can_be_followed_in_turn() -> None:
    model, _ = make("llama")
    spec = DiffuSpec(DRAFTERS["lookup"](model, None), length=FixedLength(3))
    prompts = [torch.tensor([[5, 9, 5, 9, 5]]), torch.tensor([[40, 8, 40, 8, 40, 8]])]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    runs = [spec.iterate(model, prompt, **options) for prompt in prompts]
    texts = [prompt[0].tolist() for prompt in prompts]
    going = [True, True]
    while any(going):
        for at, run in enumerate(runs):
            step = next(run, None)
            going[at] = step is not None
            if step is not None:
                assert step.rows[0] is not None
                texts[at] += step.rows[0].tokens
    for prompt, text in zip(prompts, texts, strict=True):
        assert model.generate(prompt, **options)[0].tolist() == text
