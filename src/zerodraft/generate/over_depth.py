"""Requests of a batch over depth that ask for what `generate` can be asked for, and their steps.

`generate` prepares a request as for plain decoding (lengths, logits processors, stopping criteria). What it is answered
with are the tokens of plain decoding; where they are drawn, those that `DiffuSpec` draws with the same seed.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.choice import TokenChoice
from zerodraft.decoding.stats import DecodeStats, RowStep, Step
from zerodraft.decoding.stopping import Stopping
from zerodraft.decoding.verify import Dice, Randomness
from zerodraft.fast.depth_batching import DepthBatch
from zerodraft.fast.depth_requests import DepthRequest
from zerodraft.fast.lean import packed_weights
from zerodraft.generate.door import PREFIX, RestoringSignature
from zerodraft.generate.refusals import check_inputs, check_options, check_prompts
from zerodraft.ztt.exits import ExitRule


def goes_over_depth(model: Any) -> bool:
    """Whether a batch over depth is for a model: a looped one that the lean decode path computes."""
    if model.config.model_type != "ztt" or model.config.cycles < 2:
        return False
    weights = packed_weights(model)
    return weights is not None and weights.stages is not None


def depth_request(
    model: Any,
    inputs: Int[Tensor, "B T"],
    *,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> DepthRequest:
    """The request that is answered with the tokens of `model.generate`.

    Args:
        model: That of the batch.
        inputs: The prompt, without padding.
        generator: Randomness of this request's sampling; None takes torch's global one, in which requests that are
            answered together are in each other's way.
        **arguments: Of `model.generate`: lengths, sampling, logits processors, stopping criteria.

    Raises:
        ZerodraftError: several prompts, padding, what is no decoding token by token (beams, drafts), or what a batch
            over depth does not take of one request.
    """
    given: Any = inputs
    if not isinstance(given, Tensor) or given.ndim != 2:
        raise ZerodraftError("The prompt is no tensor of tokens (1, T): give it as model.generate takes it.")
    if len(inputs) != 1:
        raise ZerodraftError(f"{len(inputs)} prompts were given for one request: make one request of each.")
    if "exit_rule" in arguments or "exit_policy" in arguments:
        raise ZerodraftError(
            "An exit rule was given with one request, but a batch over depth has one for all: give it to DepthBatch."
        )
    if "custom_generate" in arguments:
        raise ZerodraftError("custom_generate was given with a request, which DepthBatch decodes: leave it out.")
    mask = arguments.pop("attention_mask", None)
    arguments["attention_mask"] = mask = torch.ones_like(inputs) if mask is None else torch.as_tensor(mask)
    if not bool(mask.all()):
        raise ZerodraftError(
            "The attention mask has zeros, but a request cannot be padded: leave out padding and mask."
        )
    return model.generate(inputs, custom_generate=_Prepared(Dice(inputs.device, generator)), **arguments)


SETTLED = ("attention_mask", "use_cache", "logits_to_keep", "synced_gpus", "tokenizer")
"""Inputs that say nothing more about a request."""


class _Prepared:
    """A `custom_generate` that returns what it was given, as a request."""

    __signature__ = RestoringSignature()

    def __init__(self, dice: Randomness) -> None:
        self.dice = dice

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "B T"],
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        position_ids: Int[Tensor, "b P"] | None = None,
        **inputs: Any,
    ) -> DepthRequest:
        given = {name.removeprefix(PREFIX): value for name, value in inputs.items() if name not in SETTLED}
        check_options(model, generation_config, given.pop("assistant_model", None))
        check_prompts(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool), position_ids)
        check_inputs({name: value for name, value in given.items() if not _is_empty(value)}, own_target=True)
        if len(input_ids) != 1:
            raise ZerodraftError(
                f"A request has one answer, and {len(input_ids)} were asked for: make as many requests."
            )
        choice = TokenChoice(logits_processor, sample=bool(generation_config.do_sample), rows=1)
        stopping = Stopping(stopping_criteria)
        known = (EosTokenCriteria, MaxLengthCriteria)
        others = [criterion for criterion in stopping_criteria if type(criterion) not in known]
        prompt = input_ids[0].tolist()
        assert stopping.max_length is not None

        def choose(text: Int[Tensor, "1 T"], logits: Float[Tensor, " V"]) -> int:
            scores = choice.process(0, text, logits)
            return self.dice.draw(scores.softmax(-1)) if choice.sample else int(scores.argmax())

        def stops(text: Int[Tensor, "1 T"]) -> bool:
            return any(bool(criterion(text, None)[0]) for criterion in others)

        return DepthRequest(
            prompt=prompt,
            max_new_tokens=stopping.max_length - len(prompt),
            ends=stopping.eos_ids,
            choose=None if choice.plain else choose,
            stops=stops if others else None,
        )


def _is_empty(value: Any) -> bool:
    """Whether it is the cache that `generate` makes."""
    return isinstance(value, Cache) and value.get_seq_length() == 0


class OverDepth:
    """Decodes texts that are followed step by step in one batch over depth, as `DiffuSpec.iterate` does one by one.

    A text's turn reads a piece of its prompt, hands over what the others' turns have brought it, or runs the batch
    until any of its texts has a new token. One thread may follow texts.

    Args:
        batch: Is driven by these texts alone.

    Attributes:
        last_stats: What the last `iterate` did so far.
    """

    def __init__(self, batch: DepthBatch) -> None:
        self.batch = batch
        self.last_stats: DecodeStats | None = None
        self._generator: torch.Generator | None = None

    def seeded(self, seed: int) -> "OverDepth":
        """The same for one of several texts, with random choices and statistics of its own."""
        other = copy.copy(self)
        other._generator = torch.Generator().manual_seed(seed)
        return other

    def iterate(
        self,
        model: Any,
        inputs: Int[Tensor, "1 T"],
        *,
        exit_rule: ExitRule | None = None,
        prefill_chunk_size: int | None = None,
        **arguments: Any,
    ) -> Iterator[Step]:
        """Decode step by step: the arguments are those of `model.generate`. A step tells the `cycles` of its tokens;
        one in which a piece of the prompt was read, or others alone got any, has none.

        Raises:
            ZerodraftError: an exit rule that is not the batch's, or a request that does not fit into it.
        """
        if exit_rule is not self.batch.exit_rule:
            raise ZerodraftError("A batch over depth has one exit rule for all texts: leave this one out.")
        prompt = self.batch.prompt(depth_request(model, inputs, generator=self._generator, **arguments))
        stats = self.last_stats = DecodeStats(1, inputs.shape[1])
        while True:
            with stats.timed("prefill"):
                read = prompt.read(prefill_chunk_size)
            if read:
                break
            yield Step([None])
        key = self.batch.submit(prompt)
        # its keys and values are the batch's from now on
        del prompt
        try:
            answer, told = self.batch.answer(key), 0
            while answer.finish_reason is None or told < len(answer.tokens):
                before = self.batch.work.tokens
                while answer.finish_reason is None and told == len(answer.tokens) and before == self.batch.work.tokens:
                    self.batch.step()
                tokens, depths = answer.tokens[told:], answer.depths[told:]
                told += len(tokens)
                step = Step([RowStep([], [], [], tokens, tokens[-1], depths) if tokens else None])
                stats.count(step, [0], draft=False)
                yield step
            if answer.error is not None:
                raise answer.error
        finally:
            self.batch.cancel(key)
