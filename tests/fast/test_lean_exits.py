"""Early exit on the lean path: the tokens, depths and masses of the model's own forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.generating import spec_for
from tests.fast.cycled import CYCLED, over
from tests.ztt.tiny import gap, left_padded, tiny, tokens
from zerodraft import ConfidenceExit, DiffuSpec, FixedExit, LatentExit, ZeroMassExit, ZttForCausalLM
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lengths import FixedLength
from zerodraft.drafters.none import NoDrafter
from zerodraft.fast.lean import LeanTarget, lean_target
from zerodraft.ztt.exits import CycleOutput, ExitRule, ScoredRule

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
NAMES = (
    "cycled llama",
    "cycled mistral, window of 5, no head and tail",
    "cycled qwen2, gates, no tail",
    "cycled qwen3, fed again and scaled, gates",
    "cycled llama, fed again and scaled, gates, keys turned",
)


def prompts(rows: int) -> dict[str, Tensor]:
    lengths = (9, 5, 7)[:rows]
    return {
        name: left_padded([tokens(1, n, seed=n)[0] for n in lengths])[name] for name in ("input_ids", "attention_mask")
    }


def rule_for(kind: type[ScoredRule], model: Any, batch: dict[str, Tensor], after: int | None = None) -> ScoredRule:
    """With a threshold amid the scores of some prompts (after one cycle, or all), where the next scores are far:
    rounding decides nothing."""
    scores: list[Tensor] = []
    rule = kind(threshold=0.0)

    def collect(out: CycleOutput) -> Tensor:
        if after in (None, out.cycle):
            scores.append(rule.score(out))
        return torch.zeros(len(out.hidden), dtype=torch.bool)

    with torch.no_grad():
        model(**batch, exit_rule=collect, use_cache=False)
    ranked = torch.cat(scores).sort().values
    middle = ranked[len(ranked) // 4 : 3 * len(ranked) // 4 + 1]
    at = int(middle.diff().argmax())
    return kind(threshold=rule.sign * float(middle[at : at + 2].mean()))


def test_a_threshold_for_each_cycle() -> None:
    model, batch = CYCLED[NAMES[0]](), prompts(3)
    cycles = model.config.cycles
    middle = rule_for(LatentExit, model, batch, after=cycles - 1).threshold
    rule = LatentExit(threshold=(None,) * (cycles - 2) + (middle,))
    expected, ours = both(model, rule, "propagate", batch)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert {*ours[1].unique().tolist()} == {0, cycles - 1, cycles}
    with pytest.raises(ZerodraftError, match=f"the model's {cycles} cycles want {cycles - 1}"):
        both(model, LatentExit(threshold=(0.1,) * cycles), "propagate", batch)


def both(
    model: Any, rule: ExitRule, policy: str, batch: dict[str, Tensor], **more: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and depths of the model's own `generate`, and of ours on the lean path."""
    options, made = {**OPTIONS, "exit_rule": rule, "exit_policy": policy, **more}, []

    def make(model: Any) -> LeanTarget | None:
        made.append(lean_target(model))
        return made[-1]

    spec = DiffuSpec(NoDrafter(), length=FixedLength(0), make_target=make)
    found = [[model.generate(**batch, **options, **how), model.last_exit] for how in ({}, {"custom_generate": spec})]
    assert [type(target) for target in made] == [LeanTarget]
    return found[0], found[1]


@pytest.mark.parametrize("policy", ["propagate", "latest"])
# the kernels leave FFN gates to torch's operators; here are masks of windows for them
@pytest.mark.parametrize(("name", "compiled"), [*((name, True) for name in NAMES), (NAMES[1], False)])
def test_tokens_and_depths_are_those_of_the_model(
    name: str, policy: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("zerodraft.fast.lean.compiled_layers.kernels", lambda: None)
    model, seen = CYCLED[name](), set()
    for rows in (1, 3):
        batch = prompts(rows)
        for kind in (ZeroMassExit, LatentExit):
            expected, ours = both(model, rule_for(kind, model, batch), policy, batch)
            assert torch.equal(ours[0], expected[0])
            assert torch.equal(ours[1], expected[1])
            seen |= set(ours[1].flatten().tolist())
    assert len(seen - {0}) > 1


@pytest.mark.parametrize("policy", ["propagate", "latest"])
def test_rules_that_read_predictions_and_fixed_depths(policy: str) -> None:
    model, batch = over("qwen3", input_injection=True), prompts(3)
    for rule in (rule_for(ConfidenceExit, model, batch), FixedExit(cycles=1), FixedExit(cycles=2)):
        expected, ours = both(model, rule, policy, batch)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("pieces", [{}, {"prefill_chunk_size": 4}])
def test_depths_have_the_columns_of_generate(pieces: dict[str, int]) -> None:
    """Rows of different lengths, one with a hole in its mask."""
    model, batch = CYCLED[NAMES[0]](), prompts(3)
    batch["attention_mask"][1, -2] = 0
    rule = rule_for(LatentExit, model, batch)
    expected, ours = both(model, rule, "propagate", batch, **pieces)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert (ours[1] == 0).sum() == (batch["attention_mask"] == 0).sum()


class Watching:
    """Lets nobody go, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[CycleOutput] = []

    def __call__(self, out: CycleOutput) -> Tensor:
        self.seen.append(out)
        return torch.zeros(len(out.hidden), dtype=torch.bool)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_sees_what_the_model_shows_it(name: str) -> None:
    model, batch = CYCLED[name](), prompts(1)
    watching = {own: Watching() for own in (True, False)}
    for own, rule in watching.items():
        spec = DiffuSpec(NoDrafter(), length=FixedLength(0), make_target=None if own else lean_target)
        model.generate(**batch, **OPTIONS, exit_rule=rule, custom_generate=spec)
    assert len(watching[True].seen) == len(watching[False].seen) > 5
    for expected, found in zip(watching[True].seen, watching[False].seen, strict=True):
        assert found.cycle == expected.cycle
        assert gap(found.hidden, expected.hidden) < 1e-4
        assert gap(found.previous, expected.previous) < 1e-4
        assert (found.zero_mass is None) == (expected.zero_mass is None)
        if found.zero_mass is not None and expected.zero_mass is not None:
            assert found.zero_mass.shape == expected.zero_mass.shape
            assert gap(found.zero_mass, expected.zero_mass) < 1e-5
        assert gap(found.readout(found.hidden), expected.readout(expected.hidden)) < 1e-4


@pytest.mark.parametrize("rows", [1, 3])
def test_drafts_change_neither_tokens_nor_depths(rows: int) -> None:
    model, batch = over("llama", input_injection=True), prompts(rows)
    options = {**OPTIONS, "max_new_tokens": 20, "exit_rule": rule_for(LatentExit, model, batch)}
    answers, depths = model.generate(**batch, **options), model.last_exit
    spec = spec_for(answers, batch["attention_mask"])
    spec.make_target = lean_target
    assert torch.equal(model.generate(**batch, **options, custom_generate=spec), answers)
    assert spec.last_stats is not None
    assert spec.last_stats.steps < 20
    assert torch.equal(model.last_exit[:, : depths.shape[1]], depths)


def test_exits_hold_for_the_model_that_generates_alone() -> None:
    model, other = tiny("llama"), tiny("qwen3")
    found: list[Any] = []

    def make(model: Any) -> LeanTarget | None:
        found.extend([lean_target(other), lean_target(model)])
        return found[-1]

    spec = DiffuSpec(NoDrafter(), length=FixedLength(0), make_target=make)
    model.generate(**prompts(1), **OPTIONS, exit_rule=FixedExit(cycles=1), custom_generate=spec)
    assert [target._exits is None for target in found] == [True, False]
    assert model.last_exit.unique().tolist() == [1]
    assert lean_target(model)._exits is None


def test_what_exits_cannot_do_is_one_sentence() -> None:
    model = tiny("qwen2", schedule="layer", head_layers=0)
    spec = DiffuSpec(NoDrafter(), length=FixedLength(0))
    with pytest.raises(ZerodraftError, match='needs schedule="block"'):
        model.generate(**prompts(1), **OPTIONS, exit_rule=FixedExit(cycles=1), custom_generate=spec)
    cycled: ZttForCausalLM = tiny("llama")
    drafter: Any = NoDrafter()
    object.__setattr__(drafter, "taps", (2,))
    with pytest.raises(ZerodraftError, match="within the cycles"):
        cycled.generate(**prompts(1), **OPTIONS, exit_rule=FixedExit(cycles=1), custom_generate=DiffuSpec(drafter))
