"""Training examples for a block drafter: several blocks per sequence, their labels, and the loss over their slots.

A block may start at any position of a completion, as it would in decoding. Slot j of the block after position t is
labelled with the target's next token at t + 1 + j: either the token that stands in the completion, or the target's
whole distribution there.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from zerodraft.training.drafters.features import Features
from zerodraft.training.drafters.recipe import Label

SHARES: dict[Label, tuple[float, float]] = {
    "tokens": (1.0, 0.0), "distribution": (0.0, 1.0), "both": (0.5, 0.5), "variation": (0.1, 0.9)
}  # fmt: skip
"""Of the loss on tokens and of that on distributions."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A batch. The last tap is the target's final state; the others are the drafter's.

    Legend: B sequences, N positions, F taps, H hidden size, A blocks a sequence, K slots a block.
    """

    taps: Float[Tensor, "B N F H"]
    kept: Bool[Tensor, "B N"]
    tokens: Int[Tensor, "B N"]
    anchors: Int[Tensor, "B A"]
    is_label: Bool[Tensor, "B A K"]

    @property
    def newest(self) -> Int[Tensor, "B A"]:
        """The known token of each block, at the position after its anchor."""
        return self.tokens.gather(1, self.anchors + 1)

    @property
    def labels(self) -> Int[Tensor, "B A K"]:
        """The token each slot should predict (anything where `is_label` is false)."""
        at = self._label_positions().flatten(1)
        return self.tokens.gather(1, at).view_as(self.is_label)

    @property
    def previous(self) -> Int[Tensor, "B A K"]:
        """The token before each slot's label."""
        at = (self._label_positions() - 1).flatten(1)
        return self.tokens.gather(1, at).view_as(self.is_label)

    @property
    def target_states(self) -> Float[Tensor, "B A K H"]:
        """The target's final state from which it predicts each slot's label."""
        at = (self._label_positions() - 1).flatten(1)
        rows = torch.arange(len(at), device=at.device)[:, None]
        return self.taps[rows, at, -1].view(*self.is_label.shape, -1)

    def _label_positions(self) -> Int[Tensor, "B A K"]:
        k = self.is_label.shape[2]
        at = self.anchors[:, :, None] + 2 + torch.arange(k, device=self.anchors.device)
        return at.clamp(max=self.tokens.shape[1] - 1)


def first_anchor(prompt_length: int) -> int:
    """The last position of the prompt: decoding drafts first when the first new token is known."""
    return max(prompt_length - 1, 0)


def collate(features: Features, indices: list[int], anchors: list[Int[Tensor, "A"]], block_size: int) -> Blocks:
    """Sequences `indices` with blocks after the given positions, padded to the longest."""
    length = max(int(features.completions.lengths[i]) for i in indices)
    kept, tokens, is_label = [], [], []
    slots = torch.arange(block_size)
    for i, at in zip(indices, anchors, strict=True):
        ids = torch.from_numpy(features.completions[i][0])
        padding = length - len(ids)
        tokens.append(F.pad(ids, (0, padding)))
        kept.append(F.pad(torch.ones(len(ids), dtype=torch.bool), (0, padding)))
        is_label.append(at[:, None] + 2 + slots < len(ids))
    return Blocks(
        features.batch(indices), torch.stack(kept), torch.stack(tokens), torch.stack(anchors), torch.stack(is_label)
    )


def draw_anchors(features: Features, index: int, count: int, seed: int, copied: int = 0) -> Int[Tensor, "A"]:
    """`count` random block starts in a completion, different ones as long as there are enough.

    Args:
        features: whose completions.
        index: which of them.
        count: how many.
        seed: of the draw.
        copied: where as many tokens have stood together before, a copy of what followed is rarely wrong: no block
            starts there, if there are other places; 0: anywhere.
    """
    dice = torch.Generator().manual_seed(seed)
    tokens, prompt_length = features.completions[index]
    starts = torch.arange(first_anchor(prompt_length), len(tokens) - 2)
    if copied:
        new = torch.from_numpy(~repeated(tokens, copied))[starts + 1]
        starts = starts[new] if new.any() else starts
    if count > len(starts):
        return starts[torch.randint(len(starts), (count,), generator=dice)]
    return starts[torch.randperm(len(starts), generator=dice)[:count]]


def repeated(tokens: Int64[np.ndarray, "n"], count: int) -> Bool[np.ndarray, "n"]:
    """For each position: whether the `count` tokens up to and including it have stood together before."""
    text, seen, found = tokens.tolist(), set(), np.zeros(len(tokens), bool)
    for end in range(count, len(text) + 1):
        words = tuple(text[end - count : end])
        found[end - 1] = words in seen
        seen.add(words)
    return found


def coupled_loss(
    coupled: Float[Tensor, "B A K H"],
    logits: Float[Tensor, "B A K V"],
    head: Float[Tensor, "V H"],
    target_logits: Float[Tensor, "B A K V"] | None,
    labels: Int[Tensor, "B A K"],
    counts: Bool[Tensor, "B A K"],
    label: Label,
    decay: float,
    candidates: int = 32,
) -> Float[Tensor, ""]:
    """`block_loss` of slots that know the token before them, among the candidates that decoding would look at.

    Args:
        coupled: final states, given the tokens before.
        logits: of the slots alone; each slot's candidates are its likeliest tokens.
        head: the LM head's rows of the draft vocabulary.
        target_logits: see `block_loss`, as are the others.
        labels: see `block_loss`.
        counts: see `block_loss`.
        label: see `block_loss`.
        decay: see `block_loss`.
        candidates: how many.
    """
    ids = logits.topk(min(candidates, logits.shape[-1])).indices
    found = ids == labels[..., None]
    return block_loss(
        (head[ids] @ coupled[..., None])[..., 0],
        None if target_logits is None else target_logits.gather(-1, ids),
        torch.where(found.any(-1), found.int().argmax(-1), -1),
        counts,
        label,
        decay,
    )


def block_loss(
    logits: Float[Tensor, "B A K V"],
    target_logits: Float[Tensor, "B A K V"] | None,
    labels: Int[Tensor, "B A K"],
    counts: Bool[Tensor, "B A K"],
    label: Label,
    decay: float,
) -> Float[Tensor, ""]:
    """Mean loss over slots, slot j weighing `decay ** j`: late slots matter only when all before them were accepted.

    Args:
        logits: of the drafter over the draft vocabulary.
        target_logits: of the target over the same vocabulary; may be None for `label` "tokens".
        labels: indices into the draft vocabulary, negative where the token is not in it.
        counts: slots that have a label at all.
        label: the completion's token (cross entropy), the target's distribution (KL divergence), their mean, or
            0.1 of the first and 0.9 of the total variation between both distributions: one minus that is the share of
            sampled drafts that speculative sampling accepts (Leviathan et al., arXiv 2211.17192).
        decay: between 0 and 1.
    """
    weights = counts * decay ** torch.arange(counts.shape[2], device=counts.device)
    log_q = logits.float().log_softmax(-1)
    of_tokens, of_distribution = SHARES[label]
    total = torch.zeros((), device=logits.device)
    if of_tokens:
        known = weights * (labels >= 0)
        chosen = log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        total = total - of_tokens * (known * chosen).sum() / known.sum().clamp(min=1e-6)
    if of_distribution:
        assert target_logits is not None
        log_p = target_logits.float().log_softmax(-1)
        p = log_p.exp()
        apart = (p - log_q.exp()).abs() / 2 if label == "variation" else p * (log_p - log_q)
        total = total + of_distribution * (weights * apart.sum(-1)).sum() / weights.sum().clamp(min=1e-6)
    return total
