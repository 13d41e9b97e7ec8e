"""The idea in one file drafts, searches and writes what the real thing does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ztt.tiny import VOCABULARY, tiny_plain, tokens
from zerodraft.decoding.idea import decode
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import AdaptiveLength
from zerodraft.decoding.protocols import Progress
from zerodraft.generate.huggingface import DiffuSpec

NEW = 60


def drafted(answer: Sequence[int], known: int, k: int, right: float) -> Tensor:
    """Log-probabilities of the k tokens after the first `known` of a text that is known to end as the answer does; how
    often its token comes first is told by `right`."""
    random = np.random.default_rng([known, k])
    scores = torch.from_numpy(random.normal(size=(k, VOCABULARY)))
    for row, token in zip(scores, answer[known:], strict=False):
        row[token] += 6.0 if random.random() < right else 2.0
    return scores.log_softmax(-1).float()


@dataclass
class Drafter:
    """The same for the real thing, which notes what it was asked for."""

    answer: Sequence[int]
    right: float
    max_length: int = 30
    taps: Sequence[int] = ()
    asked: list[tuple[int, int]] = field(default_factory=list)
    known: int = 0

    def check(self, config: Any) -> None:
        """Fits everything."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "Drafter":
        return self

    def observe(self, progress: Sequence[Progress]) -> None:
        self.known += len(progress[0].tokens)

    def rewind(self, row: int, length: int) -> None:
        self.known = length

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        self.asked.append((self.known, lengths[0]))
        log_q, ids = drafted(self.answer, self.known, lengths[0], self.right).sort(dim=-1, descending=True, stable=True)
        return [Lattice(ids.numpy(), log_q.numpy())]


class Proxy:
    """Random scores of a token after another one."""

    def __init__(self) -> None:
        self.log_p = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
        self.last = 0

    def start(self) -> "Proxy":
        return self

    def observe(self, known: Sequence[int]) -> None:
        self.last = known[-1]

    def root(self) -> int:
        return self.last

    def score(self, states: Sequence[int], candidates: np.ndarray) -> np.ndarray:
        return self.log_p[list(states)][:, torch.from_numpy(candidates)].numpy()

    def advance(self, state: int, token: int) -> int:
        return token

    def table(self, ids: np.ndarray) -> None:
        return None


@pytest.mark.parametrize("right", [0.0, 0.7, 0.97, 1.0])
@torch.no_grad()
def test_drafts_and_tokens_are_the_real_thing_s(right: float) -> None:
    model, prompt = tiny_plain("llama", eos_token_id=None), tokens(1, 7)
    plain = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    answer = plain[0].tolist()

    drafter, proxy = Drafter(answer, right), Proxy()
    spec = DiffuSpec(drafter, proxy=proxy, length=AdaptiveLength(), fallback=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=NEW, do_sample=False, custom_generate=spec), plain)

    asked: list[tuple[int, int]] = []

    def draft(text: list[int], k: int) -> Tensor:
        if k:
            asked.append((len(text), k))
        return drafted(answer, len(text), k, right)

    written = decode(
        lambda text: model(torch.tensor([text])).logits[0, -1],
        draft,
        lambda text: proxy.log_p[text[-1]],
        prompt[0].tolist(),
        NEW,
    )
    assert written == answer
    # the same drafts at the same places: lengths and what was accepted agree in every step
    assert asked == drafter.asked
    assert len(asked) < NEW - 10 or right == 0.0
    assert right < 0.97 or max(k for _, k in asked) > 20
