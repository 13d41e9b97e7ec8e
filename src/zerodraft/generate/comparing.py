"""Where two greedy texts part, and whether rounding explains it."""

from typing import Any

import torch

NEAR_TIE = 1e-3
"""Logits in float32 this close can change places when the same sums are taken in another order."""


def near_tie(dtype: torch.dtype) -> float:
    """The same for a model that computes in this type: `NEAR_TIE`, or four of the steps in which the type counts from
    16 to 32, where large logits lie (0.5 in bfloat16, 0.06 in float16)."""
    return max(NEAR_TIE, 4 * 16 * torch.finfo(dtype).eps)


def first_difference(a: list[int], b: list[int]) -> int:
    """The first place where two token lists differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def top_gap(model: Any, inputs: Any, tokens: list[int]) -> float:
    """How far apart the two best logits after these tokens lie."""
    prompt = inputs["input_ids"].to(model.device)
    ids = torch.cat([prompt, torch.tensor([tokens], dtype=prompt.dtype, device=model.device)], 1)
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
