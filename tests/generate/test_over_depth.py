"""Requests over depth are what `generate` was asked for: the same tokens, greedy and drawn, alone and in company."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.fast.cycled import over
from tests.ztt.tiny import tokens
from zerodraft import DepthBatch, LatentExit, ZerodraftError, ZttForCausalLM, decoder, depth_request
from zerodraft.decoding.stats import Step
from zerodraft.generate.over_depth import OverDepth

RULE = LatentExit(threshold=0.7)
SAMPLING = {"do_sample": True, "temperature": 1.2, "top_k": 0}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "drawn": {**SAMPLING, "top_p": 0.9},
    "min_p": {**SAMPLING, "min_p": 0.05, "max_new_tokens": 5},
    "penalties": {"do_sample": False, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    "biases": {**SAMPLING, "sequence_bias": {(7,): 3.0}, "min_new_tokens": 6},
    "ends": {**SAMPLING, "eos_token_id": list(range(40, 64)), "pad_token_id": 0},
}


class NoTwice(LogitsProcessor):
    """Remembers what it was called with: no token comes a second time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores.index_fill(1, input_ids[0, -self.calls :], -torch.inf)


@pytest.fixture(scope="module")
def model() -> ZttForCausalLM:
    return over("llama", cycles=4, input_injection=True)


def asked() -> list[tuple[torch.Tensor, int, dict[str, Any]]]:
    """Prompt, seed and arguments; processors that remember are new ones."""
    kinds = [*ASKED.values(), {**SAMPLING, "logits_processor": LogitsProcessorList([NoTwice()])}]
    return [
        (tokens(1, 3 + 4 * number, seed=number), number, {"max_new_tokens": 12, **kind})
        for number, kind in enumerate(kinds)
    ]


def texts_of(steps: list[Iterator[Step]]) -> list[tuple[list[int], list[int]]]:
    """Tokens and cycles of texts that are followed in turn."""
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in steps]
    going = dict(enumerate(steps))
    while going:
        for number, of in list(going.items()):
            step = next(of, None)
            if step is None:
                del going[number]
            elif step.rows[0] is not None:
                found[number][0].extend(step.rows[0].tokens)
                found[number][1].extend(step.rows[0].cycles or [])
    return found


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_in_company_are_those_with_drafts_alone(model: ZttForCausalLM, chunk: int | None, rows: int) -> None:
    decode = decoder(model, "lookup")
    wanted = [
        *(texts_of([decode.seeded(seed).iterate(model, ids, exit_rule=RULE, **how)]) for ids, seed, how in asked())
    ]
    together = OverDepth(DepthBatch(model, rows=rows, slots=64, exit_rule=RULE))
    decodes = [(together.seeded(seed), ids, how) for ids, seed, how in asked()]
    found = texts_of(
        [decode.iterate(model, ids, exit_rule=RULE, prefill_chunk_size=chunk, **how) for decode, ids, how in decodes]
    )
    assert [[text] for text in found] == wanted
    assert len({tuple(text) for text, _ in found}) == len(found)
    assert len(found[5][0]) < 12
    for (decode, ids, _), (text, _) in zip(decodes, found, strict=True):
        assert decode.last_stats is not None
        assert decode.last_stats.prompt_tokens == ids.shape[1]
        assert decode.last_stats.new_tokens == len(text)
        assert (decode.last_stats.reused_tokens, decode.last_stats.drafted) == (0, 0)
    assert not together.batch.busy


def test_texts_that_are_given_up_leave_their_places(model: ZttForCausalLM) -> None:
    together = OverDepth(DepthBatch(model, rows=2, slots=64, exit_rule=RULE))
    how: dict[str, Any] = {"exit_rule": RULE, "prefill_chunk_size": 4, "max_new_tokens": 12, "do_sample": False}
    long = tokens(1, 20, seed=3)
    reading, writing, waiting = (together.seeded(0).iterate(model, ids, **how) for ids in (long, long[:, :3], long))
    for of in (reading, writing, writing):
        next(of)
    assert together.batch.busy
    for of in (reading, writing, waiting):
        of.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert not together.batch.busy
    (alone,) = texts_of([together.seeded(0).iterate(model, long, **how)])
    assert len(alone[0]) == 12


def test_a_processor_that_fails_is_one_texts_own(model: ZttForCausalLM) -> None:
    class Failing(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 6:
                raise InterruptedError
            return scores

    together = OverDepth(DepthBatch(model, rows=2, slots=64))
    ids, how = tokens(1, 4, seed=1), {"max_new_tokens": 9, "do_sample": False}
    good = together.seeded(0).iterate(model, ids, **how)
    next(good)
    bad = together.seeded(0).iterate(model, ids, logits_processor=LogitsProcessorList([Failing()]), **how)
    with pytest.raises(InterruptedError):
        texts_of([bad])
    ((rest, _),) = texts_of([good])
    assert len(rest) == 8
    assert not together.batch.busy


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_beams": 3}, "beam"),
        ({"exit_rule": RULE}, "a batch over depth has one for all"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "a request cannot be padded"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"position_ids": torch.arange(4)[None] + 3}, "position_ids"),
        ({"assistant_model": over("llama")}, "assistant_model"),
        ({"num_return_sequences": 2, "do_sample": True}, "one answer, and 2 were asked for"),
        ({"custom_generate": decoder(over("llama"))}, "custom_generate was given with a request"),
    ],
)
def test_what_no_request_can_ask_is_refused(model: ZttForCausalLM, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ZerodraftError, match=complaint):
        depth_request(model, tokens(1, 4), max_new_tokens=3, **arguments)


def test_several_prompts_and_other_rules_are_refused(model: ZttForCausalLM) -> None:
    with pytest.raises(ZerodraftError, match="2 prompts were given for one request"):
        depth_request(model, tokens(2, 4), max_new_tokens=3)
    without = depth_request(model, tokens(1, 4), attention_mask=None, max_new_tokens=3)
    assert without.prompt == tokens(1, 4)[0].tolist()
    together = OverDepth(DepthBatch(model, rows=1, slots=64))
    with pytest.raises(ZerodraftError, match="exit rule"):
        next(together.iterate(model, tokens(1, 4), exit_rule=RULE, max_new_tokens=3))
    with pytest.raises(ZerodraftError, match="slots=64"):
        next(together.iterate(model, tokens(1, 4), max_new_tokens=62))
