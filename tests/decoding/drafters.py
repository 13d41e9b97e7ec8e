"""Drafters for tests: they know the answer and spoil it at will, so that every pattern of acceptance occurs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zerodraft.decoding.lattice import NO_TOKEN, Lattice
from zerodraft.decoding.protocols import Progress


@dataclass
class NoisyDrafter:
    """Proposes the known continuation of each row, wrong now and then, among other candidates.

    Attributes:
        answers: The whole text of each row, prompt included and padding not.
        right: How often the first candidate is right; the right token is else among the others half of the time.
        seed: Of the noise.
    """

    answers: Sequence[Sequence[int]]
    vocabulary: int
    right: float = 0.7
    candidates: int = 3
    seed: int = 0
    short: bool = False
    taps: Sequence[int] = ()
    max_length: int = 16
    log: list[list[Progress]] = field(default_factory=list)

    def check(self, config: Any) -> None:
        """Fits everything."""

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "NoisySession":
        return NoisySession(self, batch)


class NoisySession:
    def __init__(self, drafter: NoisyDrafter, batch: int) -> None:
        self.drafter = drafter
        self.texts: list[list[int]] = [[] for _ in range(batch)]
        self.random = np.random.default_rng(drafter.seed)

    def observe(self, progress: Sequence[Progress]) -> None:
        self.drafter.log.append(list(progress))
        for text, news in zip(self.texts, progress, strict=True):
            text += news.tokens.tolist()

    def rewind(self, row: int, length: int) -> None:
        del self.texts[row][length:]

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        return [self.lattice(at, length) for at, length in enumerate(lengths)]

    def lattice(self, at: int, length: int) -> Lattice:
        drafter, random = self.drafter, self.random
        if not length:
            return Lattice.empty()
        if drafter.short:
            length = int(random.integers(0, length + 1))
            if not length:
                return Lattice.empty()
        answer = list(drafter.answers[at][len(self.texts[at]) :][:length])
        answer += random.integers(0, drafter.vocabulary, length - len(answer)).tolist()
        ids = np.full((length, drafter.candidates), NO_TOKEN, np.int64)
        for place, token in enumerate(answer):
            others = [t for t in random.permutation(drafter.vocabulary).tolist() if t != token]
            row = others[: drafter.candidates]
            if random.random() < drafter.right:
                row[0] = token
            elif drafter.candidates > 1 and random.random() < 0.5:
                row[1] = token
            ids[place] = row
        log_q = np.log(np.array([0.5, 0.3, 0.2, 0.1, 0.05][: drafter.candidates], np.float32))
        return Lattice(ids, np.tile(log_q, (length, 1)))
