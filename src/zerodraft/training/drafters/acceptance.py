"""How far a drafter's blocks would be accepted, measured on completions without decoding: the target wrote them itself.

On a greedy completion the target's choices are the tokens that stand there. A draft of likeliest tokens from any
position is accepted up to its first difference, so all blocks of a completion can be judged in one pass, and walking
over them by what each accepts gives the mean accepted tokens per step (MAT) of greedy decoding with plain blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from zerodraft.drafters.block_model import BlockDrafterModel
from zerodraft.drafters.dflash_model import DFlashModel
from zerodraft.training.drafters.blocks import Blocks, collate, first_anchor
from zerodraft.training.drafters.features import Features

CANDIDATES = 16
"""Of each slot, where slots are coupled: as many as decoding looks at."""
CHUNK = 64
"""Blocks judged at once: keeps the attention mask small."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance over several completions.

    **Fields:** `mat` is tokens per target step, the target's own token included (1 is plain decoding);
    `by_position[j]` the share of steps whose first j + 1 drafted tokens were all right; `ranks[j, r]` the share of all
    blocks where the right token of slot j was the drafter's choice number r (the last column: further down or not in
    the draft vocabulary);
    `confidence[b]` and `correct[b]` the mean probability and share right of first choices, in ten bins of probability.
    """

    mat: float
    steps: int
    by_position: Float[np.ndarray, "K"]
    ranks: Float[np.ndarray, "K R"]
    confidence: Float[np.ndarray, "10"]
    correct: Float[np.ndarray, "10"]
    bin_counts: Int64[np.ndarray, "10"]


@torch.no_grad()
def measure_acceptance(
    drafter: BlockDrafterModel | DFlashModel,
    features: Features,
    indices: Sequence[int],
    embedding: Float[Tensor, "V H"],
    head: Float[Tensor, "v H"],
    ranks: int = 8,
) -> Acceptance:
    """Judges all blocks of the completions `indices` (greedy ones) and walks over them."""
    k = drafter.config.block_size
    accepted = np.zeros(k + 1, np.int64)
    rank_counts = np.zeros((k, ranks + 1))
    bins = np.zeros((10, 3))
    new_tokens = steps = 0
    for index in indices:
        tokens, prompt_length = features.completions[index]
        first = first_anchor(prompt_length)
        lengths = np.empty(0, np.int64)
        for start in range(first, len(tokens) - 2, CHUNK):
            at = torch.arange(start, min(start + CHUNK, len(tokens) - 2))
            blocks = collate(features, [index], [at], k)
            rank, top = _ranks(drafter, blocks, embedding, head, ranks)
            counted = blocks.is_label[0].numpy()
            lengths = np.append(lengths, ((rank == 0) & counted).cumprod(1).sum(1))
            for j in range(k):
                rank_counts[j] += np.bincount(rank[counted[:, j], j], minlength=ranks + 1)
            which = np.minimum((top[counted] * 10).astype(int), 9)
            for column, values in enumerate((np.ones(which.size), top[counted], rank[counted] == 0)):
                bins[:, column] += np.bincount(which, weights=values, minlength=10)
        at = 0
        while at < len(lengths):
            accepted[lengths[at]] += 1
            at += lengths[at] + 1
            steps += 1
        # the first token comes from the prompt's own pass
        new_tokens += len(tokens) - 2 - first
    seen = bins[:, 0].clip(1)
    return Acceptance(
        mat=new_tokens / max(steps, 1),
        steps=steps,
        by_position=accepted[::-1].cumsum()[::-1][1:] / max(steps, 1),
        ranks=rank_counts / rank_counts.sum(1, keepdims=True).clip(1),
        confidence=bins[:, 1] / seen,
        correct=bins[:, 2] / seen,
        bin_counts=bins[:, 0].astype(np.int64),
    )


def _ranks(
    drafter: BlockDrafterModel | DFlashModel, blocks: Blocks, embedding: Tensor, head: Tensor, ranks: int
) -> tuple[Int64[np.ndarray, "A K"], Float[np.ndarray, "A K"]]:
    """Rank of each right token among the drafter's choices (at most `ranks`), and its first choice's probability."""
    device = drafter.norm.weight.device

    def embed(ids: Tensor) -> Tensor:
        return embedding[ids.to(embedding.device)].to(device)

    hidden = drafter(
        blocks.taps[:, :, :-1].to(device), blocks.kept.to(device), blocks.anchors.to(device), embed(blocks.newest)
    )[0]  # fmt: skip
    log_q = (hidden @ head.T).float().log_softmax(-1)
    scores, ids = log_q.topk(min(ranks if drafter.coupling is None else CANDIDATES, log_q.shape[-1]))
    if drafter.coupling is not None:
        # as all tokens before were right, those of the completion are the ones that decoding would have drafted
        scores, order = drafter.rescored(hidden, embed(blocks.previous[0]), head[ids], scores).topk(ids.shape[-1])
        ids = ids.gather(-1, order)
    right = drafter.draft_ids[ids[..., :ranks]] == blocks.labels[0].to(device)[..., None]
    rank = torch.where(right.any(-1), right.int().argmax(-1), ranks)
    return rank.cpu().numpy(), scores[..., 0].exp().cpu().numpy()
