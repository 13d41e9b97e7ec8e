"""Prompts as a batch."""

import torch

from zerodraft.models.padding import left_padded


def test_prompts_of_several_lengths_end_together() -> None:
    prompts = [torch.tensor([5]), torch.tensor([6, 7, 0]), torch.tensor([8, 9])]
    batch = left_padded(prompts, pad=3)
    assert batch["input_ids"].tolist() == [[3, 3, 5], [6, 7, 0], [3, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert batch["attention_mask"].dtype == torch.long
