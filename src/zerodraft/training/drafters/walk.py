"""How far drafts are accepted, measured by walking over greedy completions: the target wrote what stands there.

For drafters that read no hidden states; those that do are measured in `acceptance`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.training.drafters.completions import Completions


@dataclass(frozen=True, slots=True)
class WalkAcceptance:
    """Tokens per target pass (the target's own included), the passes, and the share of them that accepted j + 1
    tokens."""

    mat: float
    steps: int
    by_position: Float[np.ndarray, " k"]


@torch.no_grad()
def measure_walks(
    accepted_drafts: Callable[[Int[Tensor, " n"], int], list[int]],
    completions: Completions,
    indices: Sequence[int],
    k: int,
) -> WalkAcceptance:
    """Acceptance of drafts of `k` tokens over several completions.

    Args:
        accepted_drafts: how many tokens of each draft are accepted, given a text and how much of it is known at first.
        completions: among them greedy ones.
        indices: numbers of these.
        k: tokens of a draft.
    """
    accepted: list[int] = []
    new_tokens = 0
    for i in indices:
        array, prompt_length = completions[i]
        tokens, known = torch.from_numpy(array), first_drafted(prompt_length)
        new_tokens += len(tokens) - known
        accepted += accepted_drafts(tokens, known)
    counts = np.array(accepted, np.int64)
    by_position = np.array([(counts > j).sum() for j in range(k)]) / max(len(counts), 1)
    return WalkAcceptance(new_tokens / max(len(counts), 1), len(counts), by_position)


def first_drafted(prompt_length: int) -> int:
    """Where the first drafted token stands: the prompt's own pass brings the first new one."""
    return max(prompt_length, 1) + 1


def walk(drafter: MaskedDrafter | AutoregressiveDrafter, tokens: Int[Tensor, " n"], known: int, k: int) -> list[int]:
    """How many tokens of each draft are accepted, with the drafter at work as in decoding: a draft of first candidates
    is accepted up to its first difference from what the target wrote."""
    session, seen = drafter.start(1, drafter.model.device, None), 0
    accepted = []
    while known < len(tokens):
        session.observe([Progress(tokens[seen:known], None)])
        (lattice,) = session.propose([k])
        end = min(known + len(lattice), len(tokens))
        right = lattice.ids[: end - known, 0] == tokens[known:end].numpy()
        accepted.append(int(right.cumprod().sum()))
        seen, known = known, known + accepted[-1] + 1
    return accepted
