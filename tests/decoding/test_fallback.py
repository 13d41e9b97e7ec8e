"""Plain steps while drafts do not pay: by made-up times, whatever a drafter costs and brings, little is lost and much
is kept; in the engine, by a clock that only the parts move."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zerodraft import (
    AdaptiveLength,
    CostAwareLength,
    CostAwareTree,
    DiffuSpec,
    FixedLength,
    HybridDrafter,
    SearchConfig,
)
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.costs import Costs
from zerodraft.decoding.fallback import FIRST_PLAIN, LONGEST_REST, Fallback
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import DraftSession, Progress, TargetOutput

V = 50


def speed(
    fallback: Fallback,
    *,
    right: float,
    draft: float,
    position: float = 0.0,
    k: int = 8,
    tokens: int = 200,
    seed: int = 0,
    busy: float = 0.0,
) -> float:
    """Tokens in a plain step's time, where drafts cost so much (and more by the position) and each position is right
    with this chance; now and then the machine is busy with something else."""
    rng = np.random.default_rng(seed)
    fallback.begin()
    new, spent = 0, 0.0
    while new < tokens:
        asked = min(fallback.longest(), k)
        accepted = int((rng.random(asked) < right).cumprod().sum())
        seconds = 1 + (draft + position * asked if asked else 0.0)
        fallback.learn(asked, 1 + accepted, 0.02 * seconds * (4 if rng.random() < busy else 1))
        new, spent = new + 1 + accepted, spent + seconds
    return new / spent


@settings(deadline=None)
@given(
    right=st.floats(0, 1),
    draft=st.floats(0, 3),
    position=st.floats(0, 2),
    k=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_hardly_anything_is_lost_whatever_drafts_cost_and_bring(
    right: float, draft: float, position: float, k: int, seed: int
) -> None:
    fallback = Fallback()
    for _ in range(3):
        assert speed(fallback, right=right, draft=draft, position=position, k=k, seed=seed) > 0.95


def test_a_drafter_as_large_as_the_target() -> None:
    for position in (1.0, 4.0):
        assert speed(Fallback(), right=1.0, draft=0.0, position=position) > 0.95
    # far from any hope, little more than the first draft is made
    assert speed(Fallback(), right=0.0, draft=0.0, position=4.0, tokens=2000) > 0.975


@pytest.mark.parametrize("busy", [0.0, 0.03])
@pytest.mark.parametrize(("right", "draft"), [(0.6, 0.4), (0.8, 0.6), (0.8, 0.1), (0.5, 0.1)])
def test_what_pays_is_kept(right: float, draft: float, busy: float) -> None:
    whole = (1 + sum(right**i for i in range(1, 9))) / (1 + draft)
    speeds = [speed(Fallback(), right=right, draft=draft, seed=seed, busy=busy) for seed in range(40)]
    assert np.mean(speeds) > 0.93 * whole


def test_tries_become_rarer() -> None:
    fallback, tries = Fallback(), []
    for step in range(4000):
        asked = min(fallback.longest(), 8)
        fallback.learn(asked, 1.0, 1.4 if asked else 1.0)
        if asked:
            tries.append(step)
    waits = np.diff(tries)
    assert tries[0] == FIRST_PLAIN
    assert np.mean(waits[-3:]) > 100 > np.mean(waits[:8])
    assert "1.40 plain ones and brings 1.00 tokens" in fallback.why()


def test_a_draft_that_took_no_time_when_nothing_is_left() -> None:
    fallback = Fallback()
    for _ in range(FIRST_PLAIN):
        fallback.learn(0, 1.0, 1.0)
    fallback.learn(1, 1.0, 6.0)
    fallback.learn(1, 1.0, 6.0)
    assert fallback.resting
    # faster than a plain step
    fallback.learn(4, 1.0, 0.5)
    assert fallback.resting


def test_text_that_drafts_suit_again_is_noticed() -> None:
    fallback = Fallback()
    assert speed(fallback, right=0.0, draft=0.4, tokens=400) > 0.96
    assert fallback.resting
    # another text
    assert speed(fallback, right=0.9, draft=0.4, tokens=400) > 2.5
    assert not fallback.resting


@pytest.mark.parametrize("length", [20, 50, 200, 1000])
def test_tries_become_rarer_from_text_to_text_and_never_end(length: int) -> None:
    """Texts may all be shorter than a rest."""
    fallback, tries = Fallback(), []
    for step in range(8000):
        if step % length == 0:
            fallback.begin()
        asked = min(fallback.longest(), 8)
        fallback.learn(asked, 1.0, 1.4 if asked else 1.0)
        if asked:
            tries.append(step)
    early, late = (sum(start <= step < start + 2000 for step in tries) for start in (0, 6000))
    assert 2 <= late < early
    # a new text may begin just before a rest is over, and rests as long again
    assert max(np.diff(tries)) <= 2 * LONGEST_REST
    # texts that drafts suit are noticed in time, and then all is as before
    assert speed(fallback, right=0.9, draft=0.4, tokens=2000) > 2
    assert speed(fallback, right=0.9, draft=0.4, tokens=200) > 2.5


@pytest.mark.parametrize("length", [20, 50, 200])
def test_short_texts_that_drafts_suit_are_noticed_too(length: int) -> None:
    fallback = Fallback()
    assert np.mean([speed(fallback, right=0.0, draft=0.4, tokens=length) for _ in range(30)]) > 0.98
    suited = [speed(fallback, right=0.9, draft=0.4, tokens=length, seed=seed) for seed in range(2000 // length)]
    before = next(place for place, found in enumerate(suited) if found > 1)
    # one unlucky try is possible
    assert before * length <= 2 * LONGEST_REST
    assert np.mean(suited[before + 1 :]) > 2


def test_reading_a_long_prompt_counts_once() -> None:
    fallback = Fallback()
    for step in range(60):
        asked = min(fallback.longest(), 8)
        # the drafter reads 2,000 tokens first: as long as forty plain steps
        first = step == FIRST_PLAIN
        fallback.learn(asked, 1 + 0.25 * asked, 1.0 + 0.3 * (asked > 0) + 40 * first, 2000 if first else 2)
        assert asked or step < FIRST_PLAIN or step == 50


def test_a_plain_step_that_has_become_slower_is_noticed() -> None:
    fallback, costs, made = Fallback(), Costs(explore=8), []
    for costs.steps in range(1, 401):
        asked = 0 if costs.trial("plain") else min(fallback.longest(), 4)
        made.append(asked)
        # drafts would not pay at the time that plain steps took at first
        fallback.learn(asked, 2.0 if asked else 1.0, 3.2 if asked else (1.0 if len(made) < 12 else 2.0))
    assert np.mean(np.array(made[-100:]) > 0) > 0.9


@pytest.mark.parametrize("bad", [{"allowance": -1.0}, {"share": -0.1}, {"credit": float("nan")}])
def test_bad_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ZerodraftError, match=next(iter(bad))):
        Fallback(**bad)


class Clock:
    """Stands still unless somebody takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """A target that counts upwards and takes a second for a pass."""

    device = torch.device("cpu")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def prefill(self, ids: Tensor, mask: Tensor, taps: Any) -> TargetOutput:
        return self._out(ids[:, -1:])

    def score(self, ids: Tensor, depth: Tensor, visible: Tensor, taps: Any) -> TargetOutput:
        return self._out(ids)

    def _out(self, ids: Tensor) -> TargetOutput:
        self.clock.now += 1.0
        return TargetOutput(torch.nn.functional.one_hot((ids + 1) % V, V).float(), None)

    def keep(self, kept: Any) -> None:
        pass


class Drafting:
    """Counts upwards too, or wrongly; a position takes so many seconds. Remembers what it is told."""

    taps: Sequence[int] = ()
    max_length = 6

    def __init__(self, clock: Clock, seconds: float, *, right: bool) -> None:
        self.clock, self.seconds, self.right = clock, seconds, right
        self.text: list[list[int]] = []

    def check(self, config: Any) -> None:
        pass

    def start(self, batch: int, device: torch.device, generator: Any) -> DraftSession:
        self.text = [[] for _ in range(batch)]
        return self

    def observe(self, progress: Sequence[Progress]) -> None:
        for text, news in zip(self.text, progress, strict=True):
            text += news.tokens.tolist()

    def rewind(self, row: int, length: int) -> None:
        del self.text[row][length:]

    def propose(self, lengths: Sequence[int]) -> list[Lattice]:
        self.clock.now += self.seconds * max(lengths)
        return [self._lattice(text[-1], length) for text, length in zip(self.text, lengths, strict=True)]

    def _lattice(self, last: int, length: int) -> Lattice:
        ids = (last + (1 if self.right else 7) * np.arange(1, length + 1)) % V
        return Lattice(ids[:, None], np.full((length, 1), -0.1, np.float32)) if length else Lattice.empty()


LENGTHS: dict[str, Any] = {
    "published": lambda: {},
    "by cost": lambda: {"length": CostAwareLength(k_max=8)},
    "tree by cost": lambda: {
        "length": CostAwareTree(k=6),
        "search": SearchConfig(expand="best_first", budget=8),
    },
}


def decode(drafter: Any, clock: Clock, model: Any, rows: int, **options: Any) -> tuple[DiffuSpec, float]:
    spec = DiffuSpec(drafter, make_target=lambda model: Counting(clock), **options)
    spec.costs.clock = clock
    prompt = torch.arange(5).expand(rows, -1) + torch.arange(rows)[:, None]
    before = clock.now
    out = model.generate(prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, custom_generate=spec)
    steps = (torch.arange(205) + torch.arange(rows)[:, None]) % V
    assert torch.equal(out, steps)
    return spec, 200 / (clock.now - before)


@pytest.fixture(scope="module")
def model() -> Any:
    from tests.decoding.enumerating import model_of

    return model_of()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_the_engine_falls_back(hybrid: bool, name: str, rows: int, seconds: float, model: Any) -> None:
    clock = Clock()
    other = Drafting(clock, seconds, right=False)
    drafter = HybridDrafter(other=other) if hybrid else other
    spec, tokens_per_second = decode(drafter, clock, model, rows, **LENGTHS[name]())
    assert spec.last_stats is not None
    if hybrid:
        # the text repeats itself after a while
        assert tokens_per_second > 1.1
        return
    assert tokens_per_second > 0.95
    stats = spec.last_stats.to_dict()
    assert stats["plain_steps"] > 180
    assert stats["fallback"].startswith("a step with a draft takes as long as")


@pytest.mark.parametrize("name", LENGTHS)
def test_the_engine_goes_on_drafting_where_it_pays(name: str, model: Any) -> None:
    clock = Clock()
    spec, tokens_per_second = decode(Drafting(clock, 0.1, right=True), clock, model, 1, **LENGTHS[name]())
    assert tokens_per_second > 2.5
    assert spec.last_stats is not None
    assert spec.last_stats.fallback == ""
    assert spec.last_stats.plain_steps <= 5


def test_a_drafter_that_rested_knows_the_text(model: Any) -> None:
    clock = Clock()
    drafter = Drafting(clock, 0.4, right=False)
    spec, _ = decode(drafter, clock, model, 1)
    assert spec.last_stats is not None
    known = drafter.text[0]
    assert known == [i % V for i in range(len(known))]
    assert len(known) > 30


def test_fixed_lengths_are_taken_at_their_word(model: Any) -> None:
    drafter = Drafting(Clock(), 0.0, right=False)
    assert DiffuSpec(drafter, length=FixedLength(3)).fallback is None
    assert DiffuSpec(drafter, fallback=False).fallback is None
    assert DiffuSpec(drafter, length=AdaptiveLength()).fallback is not None
    assert DiffuSpec(drafter, length=FixedLength(3), fallback=Fallback()).fallback is not None
