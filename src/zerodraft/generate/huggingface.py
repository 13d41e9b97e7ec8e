"""The door for Hugging Face users: `model.generate(..., custom_generate=DiffuSpec(drafter))`.

`generate` prepares everything as for plain decoding (lengths, logits processors, stopping criteria, padding) and calls
us for the loop. The result is that of plain decoding: the same tokens for greedy decoding, the same distribution for
sampling. What is not supported is one clear error. The model is not changed.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.choice import TokenChoice, may_remember
from zerodraft.decoding.costs import Costs
from zerodraft.decoding.engine import Engine
from zerodraft.decoding.fallback import Fallback
from zerodraft.decoding.instep import InStep
from zerodraft.decoding.kept import KeptTexts, Origin
from zerodraft.decoding.lengths import AdaptiveLength, DraftLength, FixedLength
from zerodraft.decoding.protocols import Drafter, ExportingTarget, Target, check_drafter
from zerodraft.decoding.rotary import horizon
from zerodraft.decoding.scorers import CausalProxy
from zerodraft.decoding.search import SearchConfig
from zerodraft.decoding.stats import DecodeStats, Step
from zerodraft.decoding.stopping import Stopping
from zerodraft.decoding.text import Text
from zerodraft.decoding.verify import Dice, Randomness
from zerodraft.fast import best
from zerodraft.fast.target import HfTarget
from zerodraft.generate.door import PREFIX, RestoringSignature
from zerodraft.generate.feeding import feeding
from zerodraft.generate.refusals import check_cache, check_inputs, check_options, check_prompts
from zerodraft.models.caches import CACHE, for_return, the_one
from zerodraft.ztt.exits import ExitPolicy, ExitRule, check_policy
from zerodraft.ztt.interface import current
from zerodraft.ztt.pretrained import ExitRecord, ZttPreTrainedModel

MakeTarget = Callable[[Any], Target | None]
Result = Tensor | GenerateDecoderOnlyOutput

ROOM_FOR_DRAFTS = 64
"""Columns of a static cache beyond the longest text."""


class DiffuSpec:
    """Lossless speculative decoding with a drafter; give it to `generate` as `custom_generate`.

    Threads may share one: each call returns its own text, and `last_stats` is that of whichever call wrote it last.

    Args:
        drafter: Proposes tokens.
        proxy: A small causal model that judges which of them go together.
        length: How long drafts are (default: the published adaptive rule).
        search: How a lattice of candidates becomes a draft.
        tree: Verify a tree of paths; False: the best path alone.
        sample_drafts: Where tokens are sampled, draw the draft at random too (exact as well).
        make_target: Builds what runs the model. "auto": the fastest exact way on the model's machine, which keeps
            packed weights or recorded passes beside the model until `zerodraft.release(model)`. None: the model's own
            forward pass, which is also taken where the function returns None, where a given cache already holds a
            part of the text, and by "auto" where `generate` was given more inputs.
        trace: Keep every step in `last_stats.trace`.
        fallback: Makes steps plain while drafts do not pay (see `Fallback`). None: a new one, unless `length` is a
            `FixedLength`: then always draft. False: always draft, as the published method does.
        generator: Randomness of sampling; None takes torch's global one, as `generate` does.
        dice: The random choices themselves, in place of `generator`.
        reuse: Keep the keys, values and drafts' state of the last text: a call whose prompt begins like it, such as the
            next turn of a conversation, reads only the new tokens (`last_stats.reused_tokens`). `KeptTexts` keep those
            of several texts. For one row without padding, nothing else given to the model, and no exit rule; other
            calls read everything. A change of the weights is noticed, other changes of the model (adapters switched on
            or off) are not: call `forget` then.

    Attributes:
        costs: Measured costs of steps, for all calls; its `explore` says how often something but the best is tried.
        beside: The `Fallback` from a `HybridDrafter`'s model to copies alone.
        last_stats: What the last call did (of a running one: so far).
        last_result: What `generate` would have returned, once the steps of `iterate` are over.
    """

    __signature__ = RestoringSignature()

    def __init__(
        self,
        drafter: Drafter,
        *,
        proxy: CausalProxy | None = None,
        length: DraftLength | None = None,
        search: SearchConfig | None = None,
        tree: bool = True,
        sample_drafts: bool = False,
        make_target: MakeTarget | Literal["auto"] | None = "auto",
        trace: bool = False,
        fallback: Fallback | Literal[False] | None = None,
        generator: torch.Generator | None = None,
        dice: Randomness | None = None,
        reuse: bool | KeptTexts = False,
    ) -> None:
        check_drafter(drafter)
        self.drafter, self.proxy = drafter, proxy
        self.make_target: MakeTarget | Literal["auto"] | None = make_target
        self.length = AdaptiveLength() if length is None else length
        self.search = SearchConfig() if search is None else search
        self.tree, self.sample_drafts, self.trace = tree, sample_drafts, trace
        self.generator, self.dice = generator, dice
        if fallback is None:
            fallback = False if isinstance(self.length, FixedLength) else Fallback()
        self.fallback, self.beside, self.costs = fallback or None, Fallback(), Costs()
        self.reuse = reuse is not False
        self._kept = reuse if isinstance(reuse, KeptTexts) else KeptTexts(texts=1)
        self.last_stats: DecodeStats | None = None
        self.last_result: Result | None = None

    def __call__(self, model: Any, input_ids: Int[Tensor, "B T"], **arguments: Any) -> Result:
        """What `generate` calls: its decoding loop.

        Raises:
            ZerodraftError: an option, a model or a drafter that does not fit.
        """
        steps = self._decode(model, input_ids, **arguments)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def generate(
        self,
        model: Any,
        inputs: Int[Tensor, "B T"] | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        **arguments: Any,
    ) -> Result:
        """What `model.generate` returns, decoded with drafts.

        Args:
            model: The target.
            inputs: The prompts.
            streamer: Takes the tokens as they come.
            tokenizer: The model's, for stop strings.
            stop_strings: Texts that end a row.
            **arguments: Of `model.generate`.

        Raises:
            ZerodraftError: an option, a model or a drafter that does not fit.
        """
        if stop_strings:
            if tokenizer is None:
                raise ZerodraftError("stop_strings need the model's tokenizer: give tokenizer=... as well.")
            texts = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
            criteria = arguments.pop("stopping_criteria", None) or []
            arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, texts)])
        return model.generate(inputs, custom_generate=_Streamed(self, streamer), **arguments)

    def iterate(
        self,
        model: Any,
        inputs: Int[Tensor, "B T"] | None = None,
        *,
        exit_rule: ExitRule | None = None,
        exit_policy: ExitPolicy = "propagate",
        **arguments: Any,
    ) -> Iterator[Step]:
        """Decode step by step: the arguments are those of `model.generate`, whose result is then in `last_result`.

        With an exit rule for a Zero Token Transformer one text is followed, and its steps tell the `cycles` of each
        token. Several texts may be followed in turn, each with a rule of its own.

        Raises:
            ZerodraftError: an exit rule for another model, or for several texts.
        """
        # a generator: nothing runs before its first step
        steps = model.generate(inputs, custom_generate=_Steps(self), **arguments)
        if exit_rule is None:
            return steps
        if not isinstance(model, ZttPreTrainedModel):
            raise ZerodraftError(
                f"exit_rule is for Zero Token Transformers, and {type(model).__name__} is another model: leave it out."
            )
        check_policy(exit_policy)
        return _exiting(steps, ExitRecord(model, exit_rule, exit_policy))

    def _followed(self, model: Any, input_ids: Int[Tensor, "B T"], **arguments: Any) -> Iterator[Step]:
        self.last_result = None
        self.last_result = yield from self._decode(model, input_ids, **arguments)

    def seeded(self, seed: int) -> "DiffuSpec":
        """The same decoder with random choices and statistics of its own, for one of several texts that are followed
        step by step; it shares what was learnt and what is kept."""
        other = copy.copy(self)
        # the drafter draws from another generator: what it tries must not decide what is drawn here
        other.dice = Dice(generator=torch.Generator().manual_seed(seed))
        return other

    def forget(self) -> None:
        """Drop what `reuse` keeps."""
        self._kept.clear()

    @torch.no_grad()
    def _decode(
        self,
        model: Any,
        input_ids: Int[Tensor, "B T"],
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        attention_mask: Int[Tensor, "B M"] | None = None,
        position_ids: Int[Tensor, "b P"] | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **inputs: Any,
    ) -> Generator[Step, None, Result]:
        # all that a call makes is its own: one decoder may serve several threads
        config = generation_config
        past = the_one(past_key_values, cache)
        fed = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: past}
        fed |= {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}
        self.last_stats = None
        streamer = inputs.pop(PREFIX + "streamer", streamer)
        assistant = inputs.pop(PREFIX + "assistant_model", None)
        for settled in ("use_cache", "logits_to_keep", "synced_gpus"):
            inputs.pop(settled, None)
        check_options(model, config, assistant)
        held = 0 if past is None else check_cache(past, input_ids, attention_mask)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        check_inputs(inputs, own_target=callable(self.make_target))
        context = check_prompts(model, input_ids, mask, position_ids)
        self.drafter.check(model.config)
        before = feeding(model, fed)
        if before is not None:
            before(input_ids)
        changes = horizon(model)

        rows = len(input_ids)
        returns = bool(config.return_dict_in_generate)
        choice = TokenChoice(
            logits_processor,
            sample=bool(config.do_sample),
            rows=rows,
            keep_scores=returns and bool(config.output_scores),
            keep_logits=returns and bool(config.output_logits),
        )
        stopping = Stopping(stopping_criteria)
        dice = self.dice or Dice(input_ids.device, self.generator)
        padding = getattr(config, "_pad_token_tensor", None)
        pad = 0 if padding is None else int(padding)
        in_step = None
        if may_remember(logits_processor) or stopping.may_remember or before or (changes and rows > 1):
            in_step = InStep(choice=choice, stopping=stopping, dice=dice, pad=pad, before=before)
        target = None if held else self._fast_target(model, inputs)
        if target is None:
            static = config.cache_implementation == "static" and stopping.max_length is not None
            room = stopping.max_length + ROOM_FOR_DRAFTS if static and stopping.max_length else 0
            target = HfTarget(model, capacity=room, inputs=inputs, past=past)
        whole = rows == 1 and bool(mask.all()) and config.cache_implementation in (None, "dynamic")
        reuses = self.reuse and whole and not held and not inputs and changes is None and not _exits_early()
        origin = Origin.of(model, self.drafter) if reuses else None
        kept = None if origin is None else self._kept.take(input_ids[0], target, origin)
        engine = Engine(
            target=kept.target if kept else target,
            drafter=self.drafter,
            length=self.length,
            choice=choice,
            stopping=stopping,
            dice=dice,
            proxy=self.proxy,
            search=self.search,
            tree=self.tree,
            sample_drafts=self.sample_drafts,
            in_step=in_step,
            context=context,
            horizon=changes,
            # what a cache holds is no part of the prompt that is left to read
            chunk=None if held else config.prefill_chunk_size,
            generator=self.generator,
            trace=self.trace,
            costs=self.costs,
            fallback=self.fallback,
            beside=self.beside,
            kept=kept,
            # hidden states are in no cache: where the drafter wants them, all is read after all
            held=0 if self.drafter.taps else held,
        )
        stream = Streaming(streamer, engine, pad)
        try:
            for step in engine.run(input_ids, mask):
                self.last_stats = engine.stats
                stream.advance()
                yield step
        except GeneratorExit:
            # between two steps a text that is given up is as whole as one that is over
            self._keep(engine, origin)
            raise
        stream.end()
        self._keep(engine, origin)
        sequences = stream.sequences(input_ids)
        new = sequences.shape[1] - input_ids.shape[1]
        if not isinstance(engine.target, ExportingTarget):
            past = None
        elif past is not None and (returns or getattr(past, "_is_user_defined", False)):
            # a row that went on behind its own end has more in the cache; the last token was never in the target
            engine.target.export(past, sequences.shape[1] - 1)
        if not returns:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]  # a LongTensor is a Tensor of int64
            scores=choice.kept(choice.scores, new),  # pyright: ignore[reportArgumentType]  # FloatTensor likewise
            logits=choice.kept(choice.logits, new),  # pyright: ignore[reportArgumentType]  # FloatTensor likewise
            **for_return(past),
        )

    def _keep(self, engine: Engine, origin: Origin | None) -> None:
        if origin is not None and (left := engine.keep(origin)):
            self._kept.put(left)

    def _fast_target(self, model: Any, inputs: dict[str, Any]) -> Target | None:
        """What `make_target` stands for; None for the model's own forward pass."""
        if self.make_target is None:
            return None
        if callable(self.make_target):
            return self.make_target(model)
        return None if inputs else best.best_target(model)


def _exits_early() -> bool:
    """Whether a Zero Token Transformer decodes with an exit rule: what it keeps depends on the rule."""
    return current.generation is not None


def _exiting(steps: Generator[Step, None, None], exits: ExitRecord) -> Iterator[Step]:
    """One text's steps under an exit rule, which holds within them alone, with the cycles that each token took."""
    try:
        while True:
            with exits.holds():
                step = next(steps, None)
            if step is None:
                return
            if len(step.rows) > 1:
                raise ZerodraftError(
                    f"exit_rule is for one text at a time here, but there are {len(step.rows)}: decode them one by one."
                )
            (row,) = step.rows
            if row is not None and exits.depth is not None:
                # a token's depth is that of the position before it, and the last one has been nowhere yet
                depths = exits.depth[0, exits.depth.shape[1] - len(row.tokens) :]
                step = Step([replace(row, cycles=depths.tolist())])
            yield step
    finally:
        steps.close()


class _Streamed:
    """A `custom_generate` with a streamer of its own, which `generate` knows nothing of."""

    def __init__(self, spec: DiffuSpec, streamer: Any) -> None:
        self.spec, self.streamer = spec, streamer

    def __call__(self, model: Any, input_ids: Tensor, **arguments: Any) -> Result:
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        return self.spec(model, input_ids, streamer=self.streamer, **arguments)


class _Steps:
    """A `custom_generate` that returns the steps instead of running them."""

    __signature__ = RestoringSignature()

    def __init__(self, spec: DiffuSpec) -> None:
        self.spec = spec

    def __call__(self, model: Any, input_ids: Tensor, **arguments: Any) -> Iterator[Step]:
        return self.spec._followed(model, input_ids, **arguments)


class Streaming:
    """Hands tokens to a streamer as plain decoding does: one of every row at a time, padding for rows that ended."""

    def __init__(self, streamer: Any, engine: Engine, pad: int) -> None:
        self.streamer, self.engine, self.pad = streamer, engine, pad
        self._next: int | None = None

    def advance(self) -> None:
        """Hand on what all rows have by now."""
        if self.streamer is None:
            return
        texts, pads, end = self.engine.texts, self.engine.stopping.pads, self.engine.width()
        if self._next is None:
            self._next = texts[0].prompt_length
        for text in texts:
            # a row that has ended holds nobody up where padding stands in for it
            if text.stopped_at is None or not pads:
                end = min(end, text.length)
        for column in zip(*(self._row(text, self._next, end) for text in texts), strict=True):
            self.streamer.put(torch.tensor(column, device="cpu"))
        self._next = max(end, self._next)

    def end(self) -> None:
        """The text is over."""
        if self.streamer is not None:
            self.streamer.end()

    def sequences(self, prompts: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
        """What `generate` returns: prompts and new tokens, rows that ended early filled up."""
        start, end = prompts.shape[1], self.engine.width()
        return torch.cat([prompts, prompts.new_tensor([self._row(text, start, end) for text in self.engine.texts])], 1)

    def _row(self, text: Text, start: int, end: int) -> list[int]:
        """A row's tokens at the places from `start` to `end`."""
        length = text.length if text.stopped_at is None or not self.engine.stopping.pads else text.stopped_at
        tokens = text.ids(min(length, end))[0, start:].tolist()
        return tokens + [self.pad] * (end - start - len(tokens))
