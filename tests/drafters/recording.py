"""Recorded drafts of the block drafter against those of the usual path, over states that nobody computed."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ztt.tiny import tiny_plain
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import DraftSession, Progress
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import drafter_from_target

PROMPT, BACK = 12, 9
"""Positions of a text at first, and those that are left when it is taken back."""
STEPS = ((PROMPT, 4), (1, 4), (3, 2), (8, 1), (9, 4), (-1, 0), (2, 3), (40, 4), (1, 4), (5, 4), (32, 1), (9, 4), (1, 3))
"""New states and wanted positions of each draft: few, many, more than are recorded at once, past several sizes of the
cache; -1: the text is taken back."""


def pair_of(
    family: str, coupling: int, recorder: object, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[BlockDrafter, BlockDrafter]:
    """Two drafters of the same network, with every token a candidate: one records, the other does not."""
    target = tiny_plain(family)
    torch.manual_seed(0)
    model = drafter_from_target(target, num_layers=2, block_size=4, coupling=coupling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    target = target.to(device, dtype)
    recorded, usual = (BlockDrafter(model, target, candidates=10**6, recorder=recorder) for _ in range(2))
    usual.recorder = None
    return recorded, usual


class Telling:
    """A text of random tokens and states, told to sessions bit by bit; their drafts are made at the same places."""

    def __init__(self, drafter: BlockDrafter, seed: int = 0, steps: Sequence[tuple[int, int]] = STEPS) -> None:
        like, draw = drafter.model.norm.weight, torch.Generator().manual_seed(seed)
        length = sum(new for new, _ in steps) + PROMPT
        self.ids = torch.randint(60, (length + 1,), generator=draw).to(like.device)
        self.states = torch.randn(length, len(drafter.taps), len(like), generator=draw).to(like)
        self.known = 0

    def step(self, new: int, length: int, sessions: Sequence[DraftSession]) -> list[Lattice]:
        """What each session drafts behind that many new states; nothing where the text is taken back."""
        if new < 0:
            self.known = BACK
            for session in sessions:
                session.rewind(0, BACK)
            return []
        first, self.known = self.known, self.known + new
        told = self.ids[first + (first > 0) : self.known + 1], self.states[first : self.known]
        for session in sessions:
            session.observe([Progress(*told)])
        return [lattice for session in sessions for lattice in session.propose([length])]


def by_token(lattice: Lattice) -> list[NDArray[np.float32]]:
    """Log-probabilities (k, V), and those of pairs (k, V, V), in the order of the vocabulary."""
    order = lattice.ids.argsort(1)
    found = [np.take_along_axis(lattice.log_q, order, 1)]
    if lattice.pairs is not None:
        pairs = np.take_along_axis(lattice.pairs, order[:, None], 2)
        # before the first position there is one token, whatever the candidate
        pairs[1:] = np.take_along_axis(pairs[1:], order[:-1, :, None], 1)
        found.append(pairs)
    return found


CLOSE = {torch.float32: 2e-5, torch.bfloat16: 0.01}
"""How far apart drafts may be: hiding one position too many moves those in bfloat16 by 0.02 to 0.04."""


def apart(a: Lattice, b: Lattice) -> float:
    """The mean difference of log-probabilities between two lattices of all tokens, or of those of pairs if larger."""
    assert a.ids.shape == b.ids.shape
    assert np.array_equal(np.sort(a.ids, 1), np.sort(b.ids, 1))
    of_a, of_b = by_token(a), by_token(b)
    return max(float(np.abs(x - y).mean()) for x, y in zip(of_a, of_b, strict=True))


def check_recorded(recorded: BlockDrafter, usual: BlockDrafter, seed: int = 0) -> float:
    """Whether a text's drafts are recorded and the same; the largest difference of any."""
    like = recorded.model.norm.weight
    sessions = [drafter.start(1, like.device, None) for drafter in (recorded, usual)]
    telling, found = Telling(recorded, seed), []
    for new, length in STEPS:
        if lattices := telling.step(new, length, sessions):
            assert len(lattices[0]) == length
            found.append(apart(*lattices))
            assert found[-1] < CLOSE[like.dtype], (new, found[-1])
    assert recorded.recorder is not None, "they could not be recorded"
    assert not recorded._idle, "they were not recorded"
    sessions.clear()
    assert recorded._idle, "the recording was not given back"
    return max(found)
