"""Decoding methods against each other on real prompts: seconds, tokens per pass of the target, equality of tokens.

All methods run on one prompt before the next prompt begins, in an order that is drawn for each prompt, so that a
machine whose speed drifts slows all of them. Tokens are counted by ids. Greedy tokens of every method are compared with
those of transformers' plain `generate`; where they differ, it is noted how close the logits were at the first
difference: if the two best ones, and the one of the token that was written, lie within `near_tie`, it is rounding.
Where a looped model's tokens leave early, they need not be the same; it is counted how many are, each after the same
text.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zerodraft.bench.decoded import Decoded, Method
from zerodraft.bench.methods import Exits
from zerodraft.bench.prompts import Question
from zerodraft.bench.rows import References, RowFile
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.stats import DecodeStats
from zerodraft.generate.comparing import first_difference, near_tie
from zerodraft.models.loading import context_of, eos_ids
from zerodraft.models.padding import left_padded
from zerodraft.models.tokenizers import encode

Row = dict[str, Any]
"""One prompt: `id`, `task`, `prompt_tokens`, and by method what was measured."""

WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How texts are continued."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """For `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        return chosen | ({"temperature": self.temperature} if self.temperature > 0 else {})


@dataclass(frozen=True, slots=True)
class Task:
    """A question with its tokens."""

    question: Question
    inputs: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        """Of the prompt."""
        return self.inputs["input_ids"][0].tolist()

    @property
    def length(self) -> int:
        """How many they are."""
        return int(self.inputs["input_ids"].shape[1])


def encode_all(questions: Iterable[Question], tokenizer: Any, model: Any, new: int) -> list[Task]:
    """All prompts as tokens, in the chat template if there is one.

    Raises:
        ZerodraftError: one that leaves no room for the answer.
    """
    context = context_of(model.config)
    tasks = []
    for question in questions:
        encoded = encode(tokenizer, question.text, bool(tokenizer.chat_template)).to(model.device)
        tasks.append(Task(question, {name: encoded[name] for name in ("input_ids", "attention_mask")}))
        if context is not None and tasks[-1].length + new > context:
            raise ZerodraftError(
                f"Prompt '{question.id}' has {tasks[-1].length} tokens; with {new} new ones that is more than the "
                f"{context} that the target reads: leave it out, or lower --max-new-tokens."
            )
    return tasks


def measure(
    methods: Mapping[str, Method],
    tasks: Sequence[Task],
    settings: Settings,
    model: Any,
    kept: RowFile,
    on_row: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Every method on every prompt that `kept` does not have yet; the first method is what the others must equal."""
    names = list(methods)
    rows, missing = _left(tasks, kept)
    if missing:
        short = settings.options() | {"max_new_tokens": min(WARM_UP_TOKENS, settings.max_new_tokens)}
        for name in names:
            methods[name].decode(missing[0].inputs, short)
    for task in missing:
        found: dict[str, Decoded] = {}
        for name in order(names, task.question.id, settings.seed):
            torch.manual_seed(settings.seed)
            found[name] = methods[name].decode(task.inputs, settings.options())
        expected = found[names[0]].tokens[0] if not settings.temperature else None
        measured = {
            name: _record(found[name], 0, expected, task, model if methods[name].exact else None) for name in names
        }
        for name, method in methods.items():
            if isinstance(method, Exits) and expected is not None:
                measured[name]["agreed"] = [method.agreeing(task.inputs, expected), len(expected)]
        rows.append(_row(task, measured))
        kept.add(rows[-1])
        on_row(rows)
    return rows


def order(names: Sequence[str], prompt: str, seed: int) -> list[str]:
    """In which order methods run on a prompt.

    It is drawn, for prompts come task by task in turn: any order that goes round too would always begin a task with the
    same methods. And it is drawn from the prompt's name, so that a run that goes on has the order of one in a piece.
    """
    return random.Random(f"{seed}/{prompt}").sample(names, len(names))


def check_equality(
    methods: Mapping[str, Method],
    tasks: Sequence[Task],
    settings: Settings,
    model: Any,
    kept: RowFile,
    references: References,
    *,
    reference: Method,
    batch: int = 1,
    reference_batch: int = 1,
    on_row: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The greedy tokens of every method, `batch` prompts at once, against references that are decoded where missing.

    References may be decoded in batches: sums are then taken in another order than for one prompt, so where a method
    differs from such a reference, it is decoded again, alone, before the difference counts.
    """
    rows, missing = _left(tasks, kept)
    _add_references(missing, settings, model, references, reference, reference_batch)
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        found = {name: method.decode(together(part), settings.options()) for name, method in methods.items()}
        for at, task in enumerate(part):
            name = task.question.id
            expected = references.get(name, task.tokens, settings.max_new_tokens, eos_ids(model))
            if name in references.batched and any(decoded.tokens[at] != expected for decoded in found.values()):
                expected = reference.decode(task.inputs, settings.options()).tokens[0]
                references.add(name, task.tokens, expected)
            measured = {
                method: _record(decoded, at, expected, task, model, timed=False) for method, decoded in found.items()
            }
            rows.append(_row(task, measured))
            kept.add(rows[-1])
        on_row(rows)
    return rows


def _add_references(
    tasks: Sequence[Task], settings: Settings, model: Any, references: References, reference: Method, batch: int
) -> None:
    """Decode those that are missing, prompts of similar length together."""
    length, ends = settings.max_new_tokens, eos_ids(model)
    missing = [task for task in tasks if references.get(task.question.id, task.tokens, length, ends) is None]
    if batch > 1:
        missing.sort(key=lambda task: task.length)
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        found = reference.decode(together(part), settings.options())
        for task, tokens in zip(part, found.tokens, strict=True):
            references.add(task.question.id, task.tokens, tokens, batched=len(part) > 1)


def _left(tasks: Sequence[Task], kept: RowFile) -> tuple[list[Row], list[Task]]:
    """Rows that an earlier run has left, and the prompts that it has not come to."""
    rows = [row for row in kept.rows if row["id"] in {task.question.id for task in tasks}]
    done = {row["id"] for row in rows}
    return rows, [task for task in tasks if task.question.id not in done]


def together(tasks: Sequence[Task]) -> dict[str, Any]:
    """The inputs of several prompts as one batch."""
    return left_padded([task.inputs["input_ids"][0] for task in tasks])


def _row(task: Task, measured: dict[str, Any]) -> Row:
    question = task.question
    return {"id": question.id, "task": question.task, "prompt_tokens": task.length, "methods": measured}


def _record(
    decoded: Decoded, at: int, expected: list[int] | None, task: Task, model: Any, *, timed: bool = True
) -> dict[str, Any]:
    """What is kept of one method on one prompt; `model` (if given) tells how close a differing choice was."""
    tokens, alone = decoded.tokens[at], len(decoded.tokens) == 1
    record: dict[str, Any] = {"count": len(tokens)}
    if alone:
        record["passes"] = decoded.passes
    if timed:
        record["seconds"] = decoded.seconds
    if timed and decoded.stats is not None:
        record["phases"] = decoded.stats.to_dict()["seconds"]
    if decoded.depths is not None:
        # neither its steps nor its tokens are to be compared with those of full depth
        return record | {"depths": decoded.depths[at]}
    if decoded.stats is not None:
        record |= _of_stats(decoded.stats, decoded.asked, at, alone)
    if expected is None:
        return record
    record["equal"] = tokens == expected
    if not record["equal"]:
        place = first_difference(tokens, expected)
        record |= {"first_difference": place, "near_tie": False}
        # of a text that stops too early or goes on too long, no choice among tokens is to blame
        if model is not None and place < min(len(tokens), len(expected)):
            record |= closeness(model, task.inputs, expected[:place], tokens[place])
    return record


def closeness(model: Any, inputs: Mapping[str, Any], before: list[int], written: int) -> dict[str, Any]:
    """How close the choice after `before` was: `top_gap`, how far apart the two best logits lie; `deficit`, how far the
    written token's lies below the best; `near_tie`, whether rounding can explain that token."""
    prompt = inputs["input_ids"]
    ids = torch.cat([prompt, prompt.new_tensor([before])], 1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    tie = near_tie(logits.dtype)
    logits = logits.float()
    best, second = logits.topk(2).values.tolist()
    gap, deficit = best - second, best - float(logits[written])
    return {"top_gap": gap, "deficit": deficit, "near_tie": max(gap, deficit) < tie}


def _of_stats(stats: DecodeStats, asked: Mapping[int, Sequence[bool]], at: int, alone: bool) -> dict[str, Any]:
    """Of each step of a row its nodes, its accepted tokens, and whether a model drafted; of a row alone also acceptance
    by position."""
    steps = [(step.rows[at], int(n in asked and asked[n][at])) for n, step in enumerate((stats.trace or [])[1:])]
    traced = {"steps": [[len(row.drafted), len(row.accepted), by_model] for row, by_model in steps if row is not None]}
    if not alone:
        return traced
    told = stats.to_dict()
    return traced | {name: told[name] for name in ("tried_at", "accepted_at")}


def unexplained(record: Mapping[str, Any]) -> bool:
    """Whether a record's tokens differ, and rounding cannot explain it."""
    return record.get("equal") is False and not record["near_tie"]
