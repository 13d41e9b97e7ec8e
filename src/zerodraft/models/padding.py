"""Prompts of several lengths as one batch."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def left_padded(prompts: Sequence[Int[Tensor, " _"]], pad: int = 0) -> dict[str, Tensor]:
    """Several prompts as one batch with its mask. (`tokenizer.pad` needs a padding token, which many models lack.)"""
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    mask = pad_left([torch.ones_like(prompt) for prompt in prompts])
    return {"input_ids": pad_left(list(prompts), padding_value=pad), "attention_mask": mask}
