"""What `zerodraft bench decode` measures of a looped model beside its speed: what leaving early costs in loss and in
agreement with full depth, and how batches over depth pay.

Agreement is the share of the tokens of full depth that are chosen with exits too, each after the same text. The bound
of a batch over depth is that of arXiv 2608.09444.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zerodraft.bench.decode import Row
from zerodraft.bench.measure import Case, interleave, spread
from zerodraft.bench.methods import FULL, OWN_PLAIN, SELF, cycles_of
from zerodraft.fast.depth_batching import DepthBatch, DepthWork
from zerodraft.fast.depth_requests import DepthRequest
from zerodraft.generate.decoder import own_plain
from zerodraft.models.loading import eos_ids
from zerodraft.models.padding import left_padded
from zerodraft.ztt.exits import ExitRule
from zerodraft.ztt.info import model_info
from zerodraft.ztt.rules import RULES, has_masses, rule_of, scored_names
from zerodraft.ztt.tradeoff import Point, Ruler, at_level, scored_rule

LEVEL = 0.5
"""Share of the scores (of every token after every cycle but the last) that a placed threshold lets stop."""
ROUNDS = 2
"""Batches' worth of requests."""
FULL_DEPTH, OVER_DEPTH, IN_STEP = "full depth", "over depth", "in step"


def exit_rules(model: Any, wanted: Sequence[str], ruler: Ruler | None = None) -> dict[str, ExitRule]:
    """The rules that a model can use, by name: the calibrated one, every fixed depth, the registry's, and those of the
    methods that are wanted and written as a rule (`latent:0.3`). Empty for what is no looped model.

    Args:
        model: The target.
        wanted: Names of methods.
        ruler: Has a text on which thresholds are placed; None: they are the registry's examples.

    Raises:
        ZerodraftError: a wanted rule that cannot be read or does not fit the model.
    """
    cycles = cycles_of(model)
    if cycles < 2:
        return {}
    found: dict[str, ExitRule] = {}
    if model.config.exit_rule is not None:
        found["calibrated"] = rule_of(model, "calibrated")
    found |= {f"cycles:{n}": rule_of(model, f"cycles:{n}") for n in range(1, cycles)}
    for name in scored_names():
        if name == "zero-mass" and not has_masses(model.config):
            continue
        if ruler is None:
            found[name] = rule_of(model, f"{name}:{RULES[name].example}")
        else:
            rule = scored_rule(name)
            found[name] = at_level(rule, ruler.scores(rule), LEVEL)
    written = (name for name in wanted if name.partition(":")[0] in RULES and ":" in name)
    return found | {name: rule_of(model, name) for name in written if name not in found}


def exit_figures(
    rows: Sequence[Row], names: Sequence[str], cycles: int, points: Mapping[str, Point]
) -> dict[str, dict[str, Any]]:
    """Of every method with exits, and of the main exact ones beside them: cycles of a token (None where drafts took
    some too), milliseconds of a token behind the prompt's, agreement with full depth, and loss and FLOPs on a text.

    Args:
        rows: The prompts.
        names: The methods.
        cycles: Of the model.
        points: What was measured on a text, by method; `plain` is full depth.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        records = [row["methods"][name] for row in rows]
        exact = name in (OWN_PLAIN, FULL) or name.startswith(SELF)
        if not exact and not all("depths" in record for record in records):
            continue
        tokens = sum(record["count"] for record in records)
        behind = sum(record["phases"]["total"] - record["phases"]["prefill"] for record in records)
        agreed = [record["agreed"] for record in records if "agreed" in record]
        mean = cycles if name == OWN_PLAIN else None
        if not exact:
            mean = sum(sum(record["depths"]) for record in records) / tokens
        agreement = sum(a for a, _ in agreed) / sum(of for _, of in agreed) if agreed else None
        point = points.get(OWN_PLAIN if exact else name)
        found[name] = {
            "cycles_per_token": mean,
            "ms_per_token": 1e3 * behind / max(tokens - len(records), 1),
            "tokens_per_second": tokens / sum(record["seconds"] for record in records),
            "agreement": 1.0 if exact else agreement,
            "loss": None if point is None else point.loss,
            "flops": None if point is None else point.flops,
        }
    return found


def share_of_cycles(model: Any, context: int) -> float:
    """Of a looped model's cycles in the FLOPs of a token at full depth behind this many others."""
    flops = model_info(model, context=context).flops_per_token
    return model.config.cycles * (flops[1] - flops[0]) / flops[-1]


def bound(share: float, mean: float) -> float:
    """What exits would bring if skipped cycles saved all of their FLOPs: `share` is that of the cycles at full depth,
    `mean` the mean share of the cycles that are run."""
    return 1 / (1 - share + share * mean)


def batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rule: ExitRule,
    sizes: Sequence[int],
    *,
    new: int,
    repeats: int = 3,
    on_size: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Tokens per second by the number of requests at once, at full depth, over depth, and in step: in batches of
    neighbours in which all wait for the deepest token and the longest text, with the same exits.

    Args:
        model: One that `goes_over_depth`.
        prompts: As often as they are needed, in turn.
        rule: By which tokens leave.
        sizes: Requests at once.
        new: The most new tokens of a request; others have down to half of that.
        repeats: Runs of each.
        on_size: Called after each size.
    """
    share = share_of_cycles(model, round(sum(map(len, prompts)) / len(prompts)) + new // 2)
    found: dict[str, Any] = {"share_of_cycles": share, "sizes": []}
    for rows in sizes:
        todo = _requests(model, prompts, max(ROUNDS * rows, 4), new)
        found["sizes"].append({"rows": rows, "requests": len(todo), **_size(model, rows, todo, rule, share, repeats)})
        on_size(found["sizes"][-1])
    return found


def _size(
    model: Any, rows: int, todo: Sequence[DepthRequest], rule: ExitRule, share: float, repeats: int
) -> dict[str, Any]:
    texts: dict[str, list[list[int]]] = {}
    work: dict[str, DepthWork] = {}

    def over(name: str, rule: ExitRule | None) -> None:
        batch = DepthBatch(model, rows=rows, slots=max(one.slots for one in todo), exit_rule=rule)
        texts[name] = [answer.tokens for answer in batch.run(todo)]
        work[name] = batch.work

    def waiting() -> None:
        texts[IN_STEP] = in_step(model, rows, todo, rule)

    cases: dict[str, Case] = {
        FULL_DEPTH: lambda: over(FULL_DEPTH, None),
        OVER_DEPTH: lambda: over(OVER_DEPTH, rule),
        IN_STEP: waiting,
    }
    seconds = interleave(cases, repeats=repeats)
    rates = {name: [sum(map(len, texts[name])) / one for one in of] for name, of in seconds.items()}
    done = work[OVER_DEPTH]
    return {
        "tokens_per_second": {name: spread(of) for name, of in rates.items()},
        "mean_cycles": done.cycles_per_token,
        "occupancy": done.occupancy,
        "bound": bound(share, done.cycles_per_token / model.config.cycles),
        "equal": sum(a == b for a, b in zip(texts[OVER_DEPTH], texts[IN_STEP], strict=True)),
    }


def _requests(model: Any, prompts: Sequence[Sequence[int]], count: int, new: int) -> list[DepthRequest]:
    """Of different lengths, as those of users are."""
    ends = eos_ids(model)
    lengths = [new - (i * 7) % max(new // 2, 1) for i in range(count)]
    return [
        DepthRequest(prompt=prompts[i % len(prompts)], max_new_tokens=length, ends=ends)
        for i, length in enumerate(lengths)
    ]


def in_step(model: Any, rows: int, todo: Sequence[DepthRequest], rule: ExitRule) -> list[list[int]]:
    """The answers to requests, `rows` of them at once, from the first token of all to the last one of any."""
    plain, answers = own_plain(), list[list[int]]()
    for start in range(0, len(todo), rows):
        block = todo[start : start + rows]
        inputs = left_padded([torch.tensor(one.prompt) for one in block])
        out = model.generate(
            **inputs, max_new_tokens=max(one.max_new_tokens for one in block), do_sample=False, pad_token_id=0,
            exit_rule=rule, custom_generate=plain,
        )  # fmt: skip
        for one, row in zip(block, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((at + 1 for at, token in enumerate(row) if token in one.ends), len(row))
            answers.append(row[: min(end, one.max_new_tokens)])
    return answers
