"""Early exit within the compiled pass: what asking the rule in Python after each cycle gives, over all shapes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fast.cycled import CYCLED, over
from tests.fast.test_compiled import PROCESSORS, library
from tests.ztt.tiny import gap, tokens
from zerodraft import FixedExit, LatentExit, ZeroMassExit, ZttForCausalLM
from zerodraft.fast.lean import LeanTarget, lean_target, packed_weights
from zerodraft.fast.lean.cache import LeanCache
from zerodraft.fast.lean.compiled_layers import CompiledLayers
from zerodraft.fast.lean.scores import scores_of
from zerodraft.ztt.exits import CycleOutput, ExitPolicy, ExitRule, ScoredRule
from zerodraft.ztt.pretrained import ExitRecord

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

ALL = {"cycle_gates": True, "input_injection": True, "cycle_scales": True}
MODELS = {
    "five cycles": lambda: over("llama", cycles=5),
    "all parts, keys turned, zero tokens late": lambda: over(
        "qwen3", {"hidden_size": 40}, cycles=5, zero_rope="none", zero_token_start=3, edge_zero_tokens=True, **ALL
    ),
    "all parts, windows, no head and tail": lambda: over(
        "mistral", cycles=4, head_layers=0, tail_layers=0, zero_rope="relative", **ALL
    ),
    "no zero tokens, long tail": lambda: over("qwen2", cycles=4, zero_tokens=False, tail_layers=2, cycle_gates=True),
}


@cache
def model_of(name: str, narrow: bool) -> ZttForCausalLM:
    model = MODELS[name]()
    if narrow:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16().float())
    return model


class Asked:
    """A rule as one of a user, which Python asks; `margin` is how near a score came to its threshold."""

    def __init__(self, rule: ExitRule) -> None:
        self.rule, self.margin = rule, inf

    def __call__(self, out: CycleOutput) -> Tensor:
        if isinstance(self.rule, ScoredRule) and (threshold := self.rule.threshold_after(out.cycle)) is not None:
            apart = (self.rule.score(out) - self.rule.sign * threshold).abs().nan_to_num(inf)
            self.margin = min(self.margin, float(apart.min()))
        return self.rule(out)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


Passes = list[tuple[Tensor, Tensor, Tensor | None]]


def passes(
    model: Any, rule: ExitRule, policy: ExitPolicy, prompts: dict[str, Tensor], tree: dict[str, Tensor], taps: Any
) -> tuple[Passes, Tensor]:
    """Logits, depths and taps of a prompt's pass and of a draft's, and what the cache holds of the text and draft."""
    plain = lean_target(model)
    assert plain is not None
    assert isinstance(plain._weights.run, CompiledLayers)
    target = LeanTarget(plain._weights, model, ExitRecord(model, rule, policy))
    target._cache.make_room(*prompts["ids"].shape)
    with torch.inference_mode():
        target._cache.kv.zero_()
    out = target.prefill(**prompts, taps=taps)
    found = [(out.logits, target._depths.last, out.taps)]
    out = target.score(**tree, taps=taps)
    found.append((out.logits, target._depths.last, out.taps))
    return found, target._cache.kv.clone()


def check(model: Any, rule: ExitRule, policy: ExitPolicy, prompts: Any, tree: Any, taps: Any = ()) -> set[int]:
    """That both forms are equal; the depths, none where rounding may decide about one."""
    plain = lean_target(model)
    assert plain is not None
    assert plain._weights.stages is not None
    assert scores_of(rule, plain._weights.stages) is not None
    asked = Asked(rule)
    expected, kept = passes(model, asked, policy, prompts, tree, taps)
    if asked.margin < 1e-4:
        return set()
    found, ours = passes(model, rule, policy, prompts, tree, taps)
    real = prompts["mask"]
    for at, (wanted, have) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(have[1], wanted[1])
        assert gap(have[0], wanted[0]) < 1e-4
        if wanted[2] is not None:
            assert have[2] is not None
            own = real if at == 0 else torch.ones_like(tree["ids"], dtype=torch.bool)
            assert gap(have[2][own], wanted[2][own]) < 1e-4
    assert gap(ours, kept) < 1e-4
    return set(found[0][1].flatten().tolist()) | set(found[1][1].flatten().tolist())


def prompts_of(lengths: list[int], seed: int) -> dict[str, Tensor]:
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"ids": tokens(len(lengths), width, seed) * mask, "mask": mask}


def tree_of(texts: int, parents: list[int], seed: int) -> dict[str, Tensor]:
    """The same tree for every text; the parent of node i is one before it."""
    visible = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        visible[node] |= visible[parent % node]
    depth = visible.sum(1) - 1
    ids = tokens(texts, len(parents), seed + 1)
    return {"ids": ids, "depth": depth.expand(texts, -1), "visible": visible.expand(texts, -1, -1)}


def rules(cycles: int) -> st.SearchStrategy[Any]:
    """All rules that have scores and what they are made with: thresholds where tiny models' scores are, or where nobody
    or everybody is."""

    def thresholds(near: Any) -> st.SearchStrategy[Any]:
        one = near | st.sampled_from([-inf, inf])
        return one | st.lists(one | st.none(), min_size=cycles - 1, max_size=cycles - 1)

    masses = {
        "threshold": thresholds(st.floats(0.01, 0.6)),
        "pool": st.sampled_from(["mean", "max", "min"]),
        "layers": st.sampled_from(["all", "first", "last"]),
    }
    latent = {"threshold": thresholds(st.floats(0.1, 1.5))}
    return (
        st.tuples(st.just(ZeroMassExit), st.fixed_dictionaries(masses))
        | st.tuples(st.just(LatentExit), st.fixed_dictionaries(latent))
        | st.tuples(st.just(FixedExit), st.fixed_dictionaries({"cycles": st.integers(1, cycles + 1)}))
    )


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), policy=st.sampled_from(["propagate", "latest"]), narrow=st.booleans(), team=st.sampled_from([1, 3])
)
def test_it_decides_and_computes_as_when_python_is_asked(data: Any, policy: Any, narrow: bool, team: int) -> None:
    model = model_of(data.draw(st.sampled_from(sorted(MODELS))), narrow)
    kind, how = data.draw(rules(model.config.cycles))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    parents = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=12))
    seed = data.draw(st.integers(0, 3))
    first = model.config.head_layers
    taps = data.draw(st.sampled_from([(), (0,), (first,)] + [(first, len(model.config.steps()))] * (first > 0)))
    with threads(team):
        prompts, tree = prompts_of(lengths, seed), tree_of(len(lengths), parents, seed)
        assume(check(model, kind(**how), policy, prompts, tree, taps))


DEPTHS = {
    ZeroMassExit(threshold=0.2): {1, 2, 3, 4, 5},
    ZeroMassExit(threshold=(None, 0.2, None, None), layers="last", pool="max"): {2, 5},
    LatentExit(threshold=0.4): {2, 3, 4},
    LatentExit(threshold=(None, None, 0.35, None)): {3, 5},
}


@pytest.mark.parametrize("rule", DEPTHS, ids=str)
def test_depths_are_many(rule: ExitRule) -> None:
    """So that the test above has them, too."""
    prompts, tree = prompts_of([9, 4, 12], 0), tree_of(3, [0, 0, 0, 1, 1, 2], 0)
    depths = check(model_of("five cycles", False), rule, "propagate", prompts, tree)
    assert depths - {0} == DEPTHS[rule]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_exits_for_other_processors(
    processor: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = library(PROCESSORS[processor], tmp_path_factory)
    monkeypatch.setattr("zerodraft.fast.packed.kernels", lambda: functions)
    monkeypatch.setattr("zerodraft.fast.lean.compiled_layers.kernels", lambda: functions)
    model = MODELS["all parts, keys turned, zero tokens late"]()
    prompts, tree = prompts_of([9, 4], 0), tree_of(2, [0, 0, 1], 0)
    for rule in (ZeroMassExit(threshold=0.3), LatentExit(threshold=0.85)):
        assert len(check(model, rule, "latest", prompts, tree) - {0}) > 1


class Own(LatentExit):
    """Stands for a rule that a user makes out of one of ours."""


def test_rules_of_users_and_those_that_read_logits_are_asked_in_python() -> None:
    target = lean_target(CYCLED["cycled llama"]())
    assert target is not None
    stages = target._weights.stages
    assert stages is not None
    assert scores_of(Own(threshold=0.5), stages) is None
    assert scores_of(lambda out: out.hidden[:, 0] > 0, stages) is None
    found = scores_of(LatentExit(threshold=(0.25, None)), stages)
    assert found is not None
    assert found.thresholds[0] == -0.25
    assert found.thresholds[1] != found.thresholds[1]


@torch.inference_mode()
def test_a_team_sees_the_states_before_they_are_changed() -> None:
    """One token: threads that share it must not gate, scale or feed what another one has still to copy."""
    parts = {"cycle_gates": True, "cycle_scales": True, "input_injection": True}
    model = over("llama", {"hidden_size": 512}, cycles=4, **parts)
    for part in (model.cycle_gates, model.cycle_scales, model.input_injection):
        assert part is not None
        part.weight.fill_(0.5)
    weights = packed_weights(model)
    assert weights is not None
    run, each = weights.run, range(len(weights.layers))
    assert isinstance(run, CompiledLayers)
    cache = LeanCache(weights)
    cache.make_room(1, 1)
    token = cache.tokens(torch.zeros(1, 1, dtype=torch.int64), None)

    def states() -> Tensor:
        x = weights.embedding[5:6].clone()
        return torch.cat(list(run.run(x, cache.kv, token, each, head_output=x.clone(), taps=each[1:]).taps.values()))

    expected = states()
    with threads(2):
        for _ in range(500):
            assert gap(states(), expected) < 1e-4
