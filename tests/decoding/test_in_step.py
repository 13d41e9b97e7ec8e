"""What is called for tokens and may remember is called exactly as in plain decoding, whatever the drafts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from tests.decoding.generating import NEW, ends_of, prompts_of, spec_for
from tests.ztt.tiny import VOCABULARY, gap, tiny_plain, tokens


class Diary:
    """What a processor and a criterion were called with, in one order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[list[int]], Tensor | None]] = []

    def options(self) -> dict[str, Any]:
        return {
            "logits_processor": LogitsProcessorList([DiaryProcessor(self)]),
            "stopping_criteria": StoppingCriteriaList([DiaryCriterion(self)]),
        }


class DiaryProcessor(LogitsProcessor):
    """Forbids one class of tokens a row, by a state that the row's newest token moves on."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary
        self.state: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.diary.calls.append(("processor", input_ids.tolist(), scores.clone()))
        known = self.state or [0] * len(input_ids)
        self.state = [(s + int(ids[-1]) + 1) % 3 for s, ids in zip(known, input_ids, strict=True)]
        scores = scores.clone()
        for row, state in enumerate(self.state):
            scores[row, torch.arange(scores.shape[1]) % 3 == state] = -torch.inf
        return scores


class DiaryCriterion(StoppingCriteria):
    """Stops nothing, and is not to be copied: `generate` hands the list on as it is."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.diary.calls.append(("criterion", input_ids.tolist(), None if scores is None else torch.stack(scores)))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("make_target", [None, "auto"])
@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("ending", ["eos", "length"])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_call_is_one_of_plain_decoding(rows: int, ending: str, returns: bool, make_target: Any) -> None:
    """Processors before, criteria after each token, with all rows, their padding, and all scores so far."""
    model, batch = tiny_plain("llama"), prompts_of(rows)
    diaries = [Diary(), Diary()]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if returns:
        options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    free = model.generate(**batch, **options, **Diary().options())
    free = free.sequences if returns else free
    if ending == "eos":
        width = batch["input_ids"].shape[1]
        options["eos_token_id"] = [int(free[row, width + (11, 5, 8)[row]]) for row in range(rows)]
    plain = model.generate(**batch, **options, **diaries[0].options())
    answers = plain.sequences if returns else plain
    spec = spec_for(answers, batch.get("attention_mask"), make_target=make_target)
    ours = model.generate(**batch, **options, **diaries[1].options(), custom_generate=spec)
    assert torch.equal(answers, ours.sequences if returns else ours)
    assert spec.last_stats.accepted > 0
    assert spec.last_stats.new_tokens == sum(
        int(row.numel() if not (row == 0).any() else (row == 0).nonzero()[0])
        for row in answers[:, batch["input_ids"].shape[1] :]
    )
    told, heard = diaries[0].calls, diaries[1].calls
    assert [call[:2] for call in told] == [call[:2] for call in heard]
    for (_, _, a), (_, _, b) in zip(told, heard, strict=True):
        if a is not None:
            assert gap(a.clamp_min(-1e3), b.clamp_min(-1e3)) < 2e-5
    if returns:
        for name in ("scores", "logits"):
            a, b = (torch.stack(getattr(out, name)).clamp_min(-1e3) for out in (plain, ours))
            assert gap(a, b) < 2e-5


class Flags(StoppingCriteria):
    """Stops all rows once each of them has written a token, and says so in one word."""

    def __init__(self, token: int, start: int, rows: int) -> None:
        self.token, self.start, self.seen = token, start, [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for row in range(len(self.seen)):
            self.seen[row] |= self.token in input_ids[row, self.start :].tolist()
        return all(self.seen)


class Budget(StoppingCriteria):
    """Ends everything after so many calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


class Longest(MaxTimeCriteria):
    """A criterion of transformers with something of its own: stops rows whose newest token is in a list."""

    def __init__(self, stops: list[int]) -> None:
        super().__init__(max_time=1e6)
        self.stops = torch.tensor(stops)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self.stops)


class Schedule(TemperatureLogitsWarper):
    """A processor of transformers with a memory: every third call forbids the best token of each row."""

    def __init__(self) -> None:
        super().__init__(0.7)
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = super().__call__(input_ids, scores)
        return scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf) if self.calls % 3 == 0 else scores


class Across(LogitsProcessor):
    """Rows that look at each other: none may write what the row before it likes best."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, scores.argmax(1, keepdim=True).roll(1, 0), -9.0)


def closure() -> Callable[[int, Tensor], list[int]]:
    """An allowed-tokens function that moves on by itself."""
    counts: dict[int, int] = {}

    def allowed(row: int, ids: Tensor) -> list[int]:
        counts[row] = counts.get(row, 0) + 1
        return [3 + (7 * counts[row] + row + k) % (VOCABULARY - 3) for k in range(12)]

    return allowed


MEMORIES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "flags": lambda rows, start: {"stopping_criteria": StoppingCriteriaList([Flags(9, start, rows)])},
    "budget": lambda rows, start: {"stopping_criteria": StoppingCriteriaList([Budget(9)])},
    "criterion": lambda rows, start: {"stopping_criteria": StoppingCriteriaList([Longest([9, 28, 51, 12])])},
    "schedule": lambda rows, start: {"logits_processor": LogitsProcessorList([Schedule()])},
    "across": lambda rows, start: {"logits_processor": LogitsProcessorList([Across()])},
    "closure": lambda rows, start: {"prefix_allowed_tokens_fn": closure()},
}


@pytest.mark.parametrize("eos", [None, 2, "early"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", MEMORIES)
def test_memories_of_all_kinds(name: str, rows: int, eos: Any) -> None:
    model, batch = tiny_plain("qwen3"), prompts_of(rows)
    width = batch["input_ids"].shape[1]
    ends = ends_of(model, batch, [9, 4, 14]) if eos == "early" else eos
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    plain = model.generate(**batch, **options, **MEMORIES[name](rows, width))
    spec = spec_for(plain, batch.get("attention_mask"))
    ours = model.generate(**batch, **options, **MEMORIES[name](rows, width), custom_generate=spec)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("name", ["flags", "schedule", "closure"])
def test_one_seed_samples_what_plain_decoding_samples(name: str) -> None:
    """A single row draws once for each token, in both."""
    model, prompt = tiny_plain("llama").double(), tokens(1, 7)
    options = {"max_new_tokens": NEW, "do_sample": True, "eos_token_id": None, "top_k": 20}
    torch.manual_seed(3)
    plain = model.generate(prompt, **options, **MEMORIES[name](1, 7))
    torch.manual_seed(3)
    assert torch.equal(
        plain, model.generate(prompt, **options, **MEMORIES[name](1, 7), custom_generate=spec_for(plain))
    )
