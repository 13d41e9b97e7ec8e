"""A Hugging Face causal language model that continues batches of prompts, for distillation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.verify import NO_NUMBERS
from zerodraft.fast.best import best_target
from zerodraft.generate.decoder import own_plain
from zerodraft.models.loading import context_of, eos_ids
from zerodraft.models.padding import left_padded
from zerodraft.training.drafters.distill import DistillSettings


class RefuseNan(LogitsProcessor):
    """Raises `ZerodraftError` where `generate` would choose tokens among logits that are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            raise ZerodraftError(NO_NUMBERS)
        return scores


class HfWriter:
    """A Hugging Face causal language model as the writer: its own `generate`, left-padded. Greedy completions go
    through our engine where it has a faster exact path for the model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self._greedy = own_plain() if best_target(model) else None
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.context = context_of(model.config)
        self.eos_ids = eos_ids(model) or frozenset([tokenizer.eos_token_id])

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Sequence[int]], settings: DistillSettings, *, temperature: float, limit: int, seed: int
    ) -> list[list[int]]:
        """One `generate` call; the global random state is left as it was."""
        model, pad = self.model, min(self.eos_ids)
        inputs = left_padded([torch.tensor(prompt, device=model.device) for prompt in prompts], pad)
        options: dict[str, Any] = {"logits_processor": LogitsProcessorList([RefuseNan()])}
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        elif self._greedy is not None:
            options = {"custom_generate": self._greedy}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = model.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=temperature > 0,
                eos_token_id=sorted(self.eos_ids),
                pad_token_id=pad,
                **options,
            )
        return [self._until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]

    def _until_end(self, row: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(row) if token in self.eos_ids), len(row))
        return row[: end + 1]
