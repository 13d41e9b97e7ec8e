"""A target that writes completions in batches of hundreds: buffers that stay, one step recorded and replayed.

`DiffuSpec` and transformers' `generate` decide between two tokens on the host; here nothing but the question whether a
row goes on is asked there.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import StaticCache

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.verify import NO_NUMBERS
from zerodraft.fast.recorded import Recorder, RecordingError
from zerodraft.models.padding import left_padded
from zerodraft.training.drafters.completions import Completion, Completions, write_shard
from zerodraft.training.drafters.distill import DistillSettings
from zerodraft.training.drafters.writer import HfWriter
from zerodraft.training.prompts import PromptEncoder

LARGEST = 14_000_000
"""Bytes of a file."""
ROUND = 64
"""Lengths of buffers are multiples of it, so that there are few shapes."""


class Rows:
    """A batch that is written token by token: one step reads nothing but tensors that stay where they are.

    Legend: B rows, P columns of prompts, S columns in all.
    """

    def __init__(
        self, model: Any, ids: Int[Tensor, "B P"], kept: Bool[Tensor, "B P"], limit: int, choose: Any, eos: Any
    ) -> None:
        self.model, self.choose, self.device = model, choose, ids.device
        self.eos = torch.tensor(sorted(eos), device=self.device)
        prompt, self.end = ids.shape[1], ids.shape[1] + limit
        # a recorder may make some steps more
        total = self.end + 4 + -(self.end + 4) % ROUND
        self.cache = StaticCache(config=model.config, max_cache_len=total)
        self.tokens = F.pad(ids, (0, total - prompt))
        self.visible = F.pad(kept, (0, total - prompt), value=True)
        self.padding = (~kept).sum(1, keepdim=True)
        self.columns = torch.arange(total, device=self.device)
        self.open = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        # where the newest token stands
        self.at = torch.tensor([prompt - 1], device=self.device)
        own = self.columns[:prompt, None]
        # padding sees itself, as nothing would be no number
        mask = self.visible[:, None] & (self.columns <= own) | (self.columns == own)
        self._next(ids, mask[:, None], (own[:, 0] - self.padding).clamp(min=0), check=True)

    def step(self) -> None:
        """One token more for every row."""
        mask = (self.visible & (self.columns <= self.at))[:, None, None]
        self._next(self.tokens.index_select(1, self.at), mask, self.at - self.padding)

    def going_on(self) -> bool:
        """Whether a row lacks tokens."""
        at, still_open = torch.cat([self.at, self.open.sum()[None]]).tolist()
        return at + 1 < self.end and still_open > 0

    def _next(self, ids: Tensor, mask: Tensor, positions: Tensor, *, check: bool = False) -> None:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1]
        if check and not logits.isfinite().all():
            raise ZerodraftError(NO_NUMBERS)
        chosen = self.choose(logits)[:, None]
        self.at += 1
        self.tokens.index_copy_(1, self.at, chosen)
        self.open &= (chosen != self.eos).all(1)


def choose(logits: Float[Tensor, "B V"], temperature: float, settings: DistillSettings) -> Int[Tensor, " B"]:
    """The likeliest token at temperature 0, else a sampled one of the top k, top p."""
    if temperature == 0:
        return logits.argmax(-1)
    scores, ids = logits.float().topk(min(settings.top_k or logits.shape[-1], logits.shape[-1]))
    p = (scores / temperature).softmax(-1)
    p = p * (p.cumsum(-1) - p < settings.top_p)
    # the first of several exponential clocks rings with the probability of its rate
    return ids.gather(-1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))[:, 0]


class StaticWriter(HfWriter):
    """The target as the writer of large batches: buffers that stay, and a step that is recorded once a batch.

    Args:
        model: see `HfWriter`, as is the next.
        tokenizer: see `HfWriter`.
        recorder: makes what records steps on a device, such as `CudaGraphs`; where it cannot, they run one by one.
    """

    def __init__(self, model: Any, tokenizer: Any, recorder: Callable[[torch.device], Recorder]) -> None:
        super().__init__(model, tokenizer)
        self.recorder, self.recorded = recorder, True

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Sequence[int]], settings: DistillSettings, *, temperature: float, limit: int, seed: int
    ) -> list[list[int]]:
        """See `Writer.write`."""
        device = self.model.device
        inputs = left_padded([torch.tensor(prompt) for prompt in prompts], min(self.eos_ids))
        more = -inputs["input_ids"].shape[1] % ROUND
        ids = F.pad(inputs["input_ids"], (more, 0)).to(device)
        kept = F.pad(inputs["attention_mask"], (more, 0)).bool().to(device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            how = partial(choose, temperature=temperature, settings=settings)
            rows = Rows(self.model, ids, kept, limit, how, self.eos_ids)
            step: Callable[[], Any] = rows.step
            if self.recorded and limit > ROUND // 4:
                try:
                    step = self.recorder(device)(step)
                except RecordingError as error:
                    logging.getLogger(__name__).warning("steps run one by one: %s", error)
                    self.recorded = False
            while rows.going_on():
                step()
        return [self._until_end(row) for row in rows.tokens[:, ids.shape[1] : rows.end].tolist()]


class Encoder(PromptEncoder):
    """Remembers tokens, as every round asks the same prompts."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """See `PromptEncoder`."""
        if text not in self.known:
            self.known[text] = super().__call__(text)
        return self.known[text]


def pack(completions: Completions, folder: Path, vocabulary: int) -> None:
    """All sequences in as few shards as files may be large."""
    shard = np.dtype(np.uint16).itemsize * completions.lengths.cumsum() // LARGEST
    for number in range(int(shard[-1]) + 1):
        rows = [
            Completion(tokens.tolist(), prompt, float(completions.temperatures[i]), completions.sources[i])
            for i in np.flatnonzero(shard == number).tolist()
            for tokens, prompt in [completions[i]]
        ]
        write_shard(folder, f"part-{number}", rows, vocabulary)
