"""The exact distribution of what is sampled: a tiny model with four tokens, and every random choice made once."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ztt.tiny import randomise

V, NEW = 4, 3
# it lacks tokens: what processors make of a token then depends on whether a draft holds it
PROMPT = torch.tensor([[1, 1]])


class Enumerator:
    """Random choices by plan: `run` calls a function once for every sequence of choices, with its probability."""

    def __init__(self) -> None:
        self.plan: list[int] = []
        self.chances: list[list[float]] = []
        self.weight = 1.0

    def choose(self, chances: Sequence[float]) -> int:
        at = len(self.chances)
        if at == len(self.plan):
            self.plan.append(next(i for i, chance in enumerate(chances) if chance > 0))
        self.chances.append(list(chances))
        self.weight *= chances[self.plan[at]]
        return self.plan[at]

    def run(self, outcome: Callable[[], Any]) -> dict[Any, float]:
        total: dict[Any, float] = defaultdict(float)
        while True:
            self.chances, self.weight = [], 1.0
            total[outcome()] += self.weight
            while self.plan:
                last = self.plan.pop()
                chances = self.chances[len(self.plan)]
                later = [i for i in range(last + 1, len(chances)) if chances[i] > 0]
                if later:
                    self.plan.append(later[0])
                    break
            else:
                return dict(total)

    def draw(self, p: Tensor) -> int:
        return self.choose(p.tolist())

    def accept(self, p: Tensor, q: float) -> bool:
        chance = min(1.0, float(p) / q)
        return self.choose([chance, 1 - chance]) == 0

    def pick(self, q: np.ndarray) -> np.ndarray:
        return np.array([self.choose(row.tolist()) for row in q], np.int64)


def model_of() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, bos_token_id=None, eos_token_id=None, **sizes)).eval()
    randomise(model)
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 2},
    "penalty": {"repetition_penalty": 1.6, "temperature": 1.3},
}


def settings(options: dict[str, Any]) -> dict[str, Any]:
    return {"do_sample": True, "max_new_tokens": NEW, "top_k": 0, **options}


def exact(model: Any, options: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The distribution of plain decoding: transformers' own scores after every text."""
    total = {(): 1.0}
    for at in range(NEW):
        grown = {}
        for text, chance in total.items():
            ids = torch.cat([PROMPT, torch.tensor([text], dtype=torch.long)], 1).to(model.device)
            step = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
            p = model.generate(ids, **{**settings(options), **step}).scores[0][0].softmax(-1).tolist()
            grown |= {(*text, token): chance * p[token] for token in range(V) if p[token] > 0}
        total = grown
        assert len(total) <= V ** (at + 1)
    return total


def distance(a: dict[Any, float], b: dict[Any, float]) -> float:
    """Largest difference of a probability."""
    return max(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys())
