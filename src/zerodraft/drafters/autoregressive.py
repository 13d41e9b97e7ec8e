"""A small causal language model as the drafter: the classic of speculative decoding (arXiv 2211.17192, 2302.01318).

It drafts one token after another with a cache of its own, so its lattices are chains: each row is its distribution
after the first candidates of the rows before. Every row of a batch has its own cache, since rows accept different
numbers of tokens. Where the target would run on the lean path, so does the drafter: what it drafts decides about speed
alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters.vocabulary import check_vocabulary_size
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.models.caches import argument_of
from zerodraft.models.loading import context_of, eos_ids
from zerodraft.ztt.interface import without_exits


class AutoregressiveDrafter:
    """Drafts with a causal language model of the target's vocabulary.

    Args:
        model: Any Hugging Face causal language model whose cache can be rolled back; it is not changed.
        candidates: Candidates per position; the first one is on the path.
        max_length: The most positions drafted at once.
        temperature: 0 puts the most probable token on the path; above 0 it is drawn from the candidates at this
            temperature, with the log-probabilities that go with it.
        vocab_size: The target's vocabulary; the model's own if not given. They may differ in rows of padding, as sizes
            of one family do, and no token that the smaller one lacks is drafted.
        least: A draft ends where the chance that all of it is right falls below this.
        inputs: More arguments for each of the model's forward passes.
    """

    taps: Sequence[int] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        candidates: int = 4,
        max_length: int = 8,
        temperature: float = 0.0,
        vocab_size: int | None = None,
        least: float = 0.0,
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            raise ZerodraftError(
                f"A {model.config.model_type} model cannot draft: expected a causal language model whose cache can be "
                "rolled back when a draft is rejected."
            )
        if candidates < 1 or max_length < 1 or temperature < 0:
            raise ZerodraftError(
                f"Autoregressive drafts with {candidates} candidates, at most {max_length} positions and temperature "
                f"{temperature}: expected at least 1, at least 1 and 0 or more."
            )
        if not 0 <= least <= 1:
            raise ZerodraftError(f"least={least} must lie between 0 and 1.")
        self.model, self.temperature = model, temperature
        self.candidates, self.max_length = candidates, max_length
        text = model.config.get_text_config()
        self.own_size: int = text.vocab_size
        check_vocabulary_size(self.own_size, self.own_size if vocab_size is None else vocab_size)
        self.vocab_size = min(self.own_size, vocab_size or self.own_size)
        self.context = context_of(model.config)
        self.eos_ids = eos_ids(model)
        self.cache_argument = argument_of(model)
        self.head_options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
        self.inputs = dict(inputs or {})
        self.least = math.log(least) if least else -math.inf

    def check(self, config: Any) -> None:
        """Target and drafter must have one vocabulary, but for padding."""
        size = config.get_text_config().vocab_size
        check_vocabulary_size(self.own_size, size)
        if size < self.vocab_size:
            raise ZerodraftError(
                f"The drafter drafts among {self.vocab_size} tokens, the target has {size}: make it with "
                f"vocab_size={size}, if both have one tokenizer."
            )

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> "AutoregressiveSession":
        """A session for `batch` rows."""
        return AutoregressiveSession([DraftRow(self, generator) for _ in range(batch)])


class AutoregressiveSession:
    """One `DraftRow` a row."""

    def __init__(self, rows: list["DraftRow"]) -> None:
        self.rows = rows

    def observe(self, progress: Sequence[Progress]) -> None:
        """Keeps of each cache what became true."""
        for row, news in zip(self.rows, progress, strict=True):
            row.observe(news.tokens.tolist())

    def rewind(self, row: int, length: int) -> None:
        """Take back all but the first `length` tokens that a row was told."""
        self.rows[row].rewind(length)

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        """Drafts row by row."""
        return [row.propose(length) for row, length in zip(self.rows, lengths, strict=True)]


class DraftRow:
    """One text being drafted: the cache covers what is known but for the last tokens, and what was drafted on it."""

    def __init__(self, drafter: AutoregressiveDrafter, generator: torch.Generator | None) -> None:
        self.drafter, self.generator = drafter, generator
        # without the model's config every layer keeps all its positions, so all of them can be rolled back
        lean = None if drafter.inputs else lean_target(drafter.model)
        self.cache: DynamicCache | LeanTarget = lean or DynamicCache()
        self.cached: list[int] = []
        self.known: list[int] = []

    def observe(self, tokens: list[int]) -> None:
        """Roll the cache back to where it agrees with what is known now."""
        if not tokens:
            return
        before = min(len(self.known), len(self.cached))
        self.known += tokens
        # the last token is always fed again: its logits are what the next draft starts from
        limit = min(len(self.cached), len(self.known) - 1)
        agree = before
        while agree < limit and self.cached[agree] == self.known[agree]:
            agree += 1
        self._crop(min(agree, limit))

    def rewind(self, length: int) -> None:
        """Take back all but the first `length` known tokens."""
        del self.known[length:]
        # as in `observe`: the last token is always fed again
        self._crop(min(len(self.cached), max(length - 1, 0)))

    def _crop(self, length: int) -> None:
        """Roll the cache back to its first tokens."""
        if length == len(self.cached):
            return
        if isinstance(self.cache, LeanTarget):
            self.cache.crop([length])
        else:
            self.cache.crop(length - len(self.cached))
        del self.cached[length:]

    @torch.no_grad()
    def propose(self, length: int) -> Lattice:
        """Draft up to `length` tokens; fewer at an end-of-text token or at the end of the drafter's context."""
        drafter = self.drafter
        length = min(length, drafter.max_length)
        if drafter.context is not None:
            length = min(length, drafter.context - len(self.known))
        if length < 1 or not self.known:
            return Lattice.empty()
        ids, log_q, chance = [], [], 0.0
        pending = self.known[len(self.cached) :]
        for _ in range(length):
            candidates, scores = choose(self._feed(pending), drafter.candidates, drafter.temperature, self.generator)
            ids.append(candidates)
            log_q.append(scores)
            pending, chance = [int(candidates[0])], chance + float(scores[0])
            if pending[0] in drafter.eos_ids or chance < drafter.least:
                break
        return Lattice(np.stack(ids), np.stack(log_q), chain=True, drawn=drafter.temperature > 0)

    def _feed(self, tokens: list[int]) -> Float[Tensor, "v"]:
        """Scores of the token after these."""
        model = self.drafter.model
        # a target can write what its own padding stands for
        ids = torch.tensor([tokens], device=model.device).clamp(max=self.drafter.own_size - 1)
        self.cached += tokens
        if isinstance(self.cache, LeanTarget):
            out = self.cache.prefill(ids, torch.ones_like(ids, dtype=torch.bool), ())
            return out.logits[0, -1, : self.drafter.vocab_size]
        # the target may be this model, and its exits are not those of drafts
        with without_exits():
            out = model(
                input_ids=ids,
                use_cache=True,
                **{self.drafter.cache_argument: self.cache},
                **self.drafter.head_options,
                **self.drafter.inputs,
            )
        return out.logits[0, -1, : self.drafter.vocab_size]


def choose(
    logits: Float[Tensor, "v"], candidates: int, temperature: float, generator: torch.Generator | None
) -> tuple[Int64[np.ndarray, "m"], Float32[np.ndarray, "m"]]:
    """The candidates of one position and their log-probabilities, that of the path first: the likeliest, or above
    temperature 0 one that is drawn."""
    scores = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    top, ids = scores.topk(min(candidates, len(scores)))
    if temperature > 0:
        device = torch.device("cpu") if generator is None else generator.device
        drawn = torch.multinomial(top.exp().to(device), 1, generator=generator).item()
        order = torch.tensor([drawn, *(i for i in range(len(ids)) if i != drawn)], device=ids.device)
        top, ids = top[order], ids[order]
    return ids.cpu().numpy(), top.cpu().numpy()


def _keeps_logits(model: Any) -> bool:
    """Whether the model can leave out the scores of all positions but the last."""
    return model._supports_logits_to_keep()
