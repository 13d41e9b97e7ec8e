"""Whether a target that was made for a model scores as the model's own forward pass does: tried on a few tokens.

What a target computes is written down from what a family's code does. Whether a model does that, whatever its class and
configuration say, is best asked of the model.
"""

import logging
from typing import Any

import torch
from transformers import DynamicCache

from zerodraft.decoding.protocols import Target
from zerodraft.models.caches import argument_of

logger = logging.getLogger(__name__)

TOKENS, DRAFTED, PADDING = 10, 3, 2
"""Of a text, of its end that is scored like a draft, and on the left of the second text."""
SHORT_WINDOW = 64
"""Texts are longer than windows up to here."""
TOLERANCE = 1e-3
"""Of the largest logit. Sums in another order come to a hundredth of that."""


@torch.no_grad()
def scores_as_model(model: Any, target: Target, window: int | None = None) -> bool:
    """Whether the logits of two texts, the second one padded, are up to rounding those of plain decoding: the model's
    forward pass over its own cache.

    Args:
        model: In evaluation mode, or without dropout.
        target: A fresh one.
        window: The smallest sliding window that a layer has.
    """
    device, size = target.device, model.get_input_embeddings().num_embeddings
    count = TOKENS + (window if window is not None and window <= SHORT_WINDOW else 0)
    # neighbouring multiples of a prime lie far from each other
    ids = (torch.arange(2 * count, device=device).view(2, count) * 7919 + 1) % size
    mask = torch.ones(2, count, dtype=torch.bool, device=device)
    mask[1, :PADDING] = False
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    start = count - DRAFTED
    own = []
    # transformers' caches with windows take the default device, which may be another
    with device:
        cache = DynamicCache(config=model.config)
        for begin, end in ((0, start), (start, count)):
            # not `model(...)`, which compiles what `model.compile()` has marked
            out = model.forward(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end].long(),
                position_ids=positions[:, begin:end],
                use_cache=True,
                logits_to_keep=1 if begin == 0 else 0,
                **{argument_of(model): cache},
            )
            own.append(out.logits)
    first = target.prefill(ids[:, :start], mask[:, :start], ()).logits
    depth = torch.arange(DRAFTED, device=device).expand(2, -1)
    visible = torch.ones(2, DRAFTED, DRAFTED, dtype=torch.bool, device=device).tril()
    found = torch.cat([first, target.score(ids[:, start:], depth, visible, ()).logits], 1)
    wanted = torch.cat(own, 1)
    both = found.isnan() & wanted.isnan()
    gap, largest = (
        float((found - wanted).abs().masked_fill(both, 0).max()),
        float(wanted.nan_to_num(0, 0, 0).abs().max()),
    )
    if gap <= TOLERANCE * largest:
        return True
    logger.warning(
        "%s is run by its own forward pass alone: on a few tokens the fast path's logits are %.1e away from its own, "
        "so something in the model is not what its class and configuration say",
        type(model).__name__,
        gap,
    )
    return False
