"""What the engine emits when tokens are sampled has exactly the target's distribution; and what it costs and counts.

The engine runs through `generate` on a tiny real model with four tokens. Its random choices are made by an enumerator
that visits every one of them once, so that the distribution of the output is known to rounding, without any sampling.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoding.drafters import NoisyDrafter
from tests.decoding.enumerating import OPTIONS, PROMPT, Enumerator, V, distance, exact, model_of, settings
from zerodraft.decoding.costs import Costs
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import TargetOutput
from zerodraft.decoding.search import SearchConfig
from zerodraft.decoding.stats import DecodeStats, RowStep, Step
from zerodraft.decoding.text import Text
from zerodraft.generate.huggingface import DiffuSpec


class Credulous(Enumerator):
    """The wrong rule on purpose: it accepts whatever is drafted."""

    def accept(self, p: Tensor, q: float) -> bool:
        return True


def lattice_drafter(probabilities: Sequence[Sequence[float]]) -> Any:
    """Drafts from a fixed lattice: row i holds the probabilities of tokens 0..3 at position i, whatever the text."""

    class Fixed(NoisyDrafter):
        def start(self, batch: int, device: Any, generator: Any) -> Any:
            return self

        def observe(self, progress: Any) -> None:
            pass

        def rewind(self, row: int, length: int) -> None:
            pass

        def propose(self, lengths: Sequence[int]) -> list[Lattice]:
            lattices = []
            for length in lengths:
                q = np.array(probabilities[:length], np.float32).reshape(-1, V)
                order = (-q).argsort(1, kind="stable")
                lattices.append(Lattice(order.astype(np.int64), np.log(np.take_along_axis(q, order, 1))))
            return lattices

    return Fixed([], V)


Q = [[0.4, 0.1, 0.3, 0.2], [0.15, 0.25, 0.2, 0.4]]
KINDS: dict[str, dict[str, Any]] = {
    "path": {"tree": False, "length": FixedLength(2)},
    "tree": {"search": SearchConfig(tau=1.0, beam=5), "length": FixedLength(2)},
    "sampled path": {
        "tree": False,
        "sample_drafts": True,
        "search": SearchConfig(tau=0.6, m_max=2),
        "length": FixedLength(2),
    },
    "sampled tree": {"sample_drafts": True, "search": SearchConfig(tau=0.6, beam=2), "length": FixedLength(1)},
}


def decode(model: Any, dice: Any, kind: str, options: dict[str, Any]) -> tuple[int, ...]:
    spec = DiffuSpec(lattice_drafter(Q), make_target=None, dice=dice, **KINDS[kind])
    out = model.generate(PROMPT, custom_generate=spec, **settings(options))
    return tuple(out[0, PROMPT.shape[1] :].tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_that_of_plain_sampling(name: str, kind: str) -> None:
    model = model_of()
    enumerator = Enumerator()
    found = enumerator.run(lambda: decode(model, enumerator, kind, OPTIONS[name]))
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert distance(found, exact(model, OPTIONS[name])) < 1e-5


def test_a_wrong_rule_would_be_noticed() -> None:
    model, credulous = model_of(), Credulous()
    found = credulous.run(lambda: decode(model, credulous, "sampled path", {}))
    assert distance(found, exact(model, {})) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_processors_blind_to_the_draft_would_be_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Text.ids
    monkeypatch.setattr(Text, "ids", lambda text, length: ids(text, min(length, text.length)))
    model, enumerator = model_of(), Enumerator()
    found = enumerator.run(lambda: decode(model, enumerator, kind, OPTIONS["penalty"]))
    monkeypatch.undo()
    assert distance(found, exact(model, OPTIONS["penalty"])) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_sampled_from_the_same_distribution(kind: str) -> None:
    model, options = model_of(), OPTIONS["penalty"]
    expected = exact(model, options)
    generator = torch.Generator().manual_seed(0)
    spec = DiffuSpec(lattice_drafter(Q), make_target=None, generator=generator, **KINDS[kind])
    rows = 500
    out = model.generate(PROMPT, num_return_sequences=rows, custom_generate=spec, **settings(options))
    counts = defaultdict(int)
    for row in out[:, PROMPT.shape[1] :].tolist():
        counts[tuple(row)] += 1
    likely = [key for key, chance in expected.items() if rows * chance >= 5]
    rest = 1 - sum(expected[key] for key in likely)
    observed = [counts[key] for key in likely] + [rows - sum(counts[key] for key in likely)]
    hoped = [rows * expected[key] for key in likely] + [max(rows * rest, 1e-9)]
    chi2 = sum((o - e) ** 2 / e for o, e in zip(observed, hoped, strict=True) if e > 1)
    # mean of chi-square plus five standard deviations
    degrees = len(likely)
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_statistics_agree_with_the_trace() -> None:
    model = model_of()
    plain = model.generate(PROMPT, max_new_tokens=40, do_sample=False)
    spec = DiffuSpec(NoisyDrafter(plain.tolist(), V), length=FixedLength(3), trace=True)
    model.generate(PROMPT, max_new_tokens=40, do_sample=False, custom_generate=spec)
    stats = spec.last_stats
    assert stats is not None
    assert stats.trace is not None
    rows = [row for step in stats.trace for row in step.rows if row is not None]
    assert stats.steps == stats.row_steps == len(rows) - 1
    assert stats.new_tokens == sum(len(row.tokens) for row in rows) == 40
    assert stats.drafted == sum(len(row.drafted) for row in rows)
    assert stats.accepted == sum(len(row.accepted) for row in rows) == sum(stats.accepted_at)
    assert stats.mat == pytest.approx(39 / stats.steps)
    assert all(a <= t for a, t in zip(stats.accepted_at, stats.tried_at, strict=True))
    assert stats.other_seconds >= 0
    assert stats.total_seconds >= sum(stats.seconds.values())
    assert set(stats.to_dict()["seconds"]) == {"prefill", "draft", "search", "verify", "other", "total"}


def test_counts_by_position() -> None:
    stats = DecodeStats(2, 8)
    stats.count(Step([RowStep([], [], [], [5], 5), RowStep([], [], [], [6], 6)]), [0, 0], draft=False)
    stats.count(Step([RowStep([7, 8, 9], [-1, 0, -1], [0, 1], [7, 8, 4], 4), None]), [2, 0], draft=True)
    stats.count(Step([RowStep([7], [-1], [], [3], 3), None]), [1, 0], draft=True)
    assert (stats.steps, stats.row_steps, stats.drafted, stats.accepted, stats.new_tokens) == (2, 2, 4, 2, 6)
    assert (stats.tried_at, stats.accepted_at) == ([2, 1], [1, 1])
    assert stats.mat == 2.0


def test_lengths_hear_of_every_step() -> None:
    class Noting(FixedLength):
        heard: list[Any]

        def fresh(self, costs: Costs) -> "Noting":
            return self

        def update(self, drafted: int, generated: int, accepted: int) -> None:
            self.heard.append((drafted, generated, accepted))

    class Noted(Costs):
        def observe(self, kind: Any, k: int, seconds: float) -> None:
            assert seconds > 0
            length.heard.append((kind, k))

    model = model_of()
    plain = model.generate(PROMPT, max_new_tokens=9, do_sample=False)
    length = Noting(3)
    length.heard = []
    drafter = NoisyDrafter(plain.tolist(), V, right=1.0)
    spec = DiffuSpec(drafter, length=length, tree=False)
    spec.costs = Noted()
    model.generate(PROMPT, max_new_tokens=9, do_sample=False, custom_generate=spec)
    # 1 token from the prompt, then 3 + 1, then 3 + 1: nothing is drafted beyond the longest text
    assert length.heard == [("draft", 3), ("verify", 3), ("score", 3), (3, 3, 3)] * 2


@pytest.mark.parametrize("rows", [1, 2])
def test_the_engine_itself_is_quick(rows: int) -> None:
    """With a target and a drafter that take no time, a step takes well under 3 ms (on an idle machine: about 0.3)."""

    class Instant:
        device = torch.device("cpu")

        def prefill(self, ids: Tensor, mask: Tensor, taps: Any) -> Any:
            return self.out(ids[:, -1:])

        def score(self, ids: Tensor, depth: Tensor, visible: Tensor, taps: Any) -> Any:
            return self.out(ids)

        def out(self, ids: Tensor) -> Any:
            return TargetOutput(torch.nn.functional.one_hot((ids + 1) % V, V).float(), None)

        def keep(self, kept: Any) -> None:
            pass

    model = model_of()
    spec = DiffuSpec(lattice_drafter([[0.4, 0.3, 0.2, 0.1]] * 6), make_target=lambda model: Instant())
    prompts = PROMPT.expand(rows, -1)
    fastest = float("inf")
    for _ in range(3):
        start = process_time()
        model.generate(prompts, max_new_tokens=100, do_sample=False, custom_generate=spec)
        assert spec.last_stats is not None
        fastest = min(fastest, (process_time() - start) / spec.last_stats.steps)
    # annotations are checked here: a loose bound
    assert fastest < 0.03


def test_enumeration_visits_everything_once() -> None:
    enumerator = Enumerator()
    p = torch.tensor([0.5, 0.0, 0.25, 0.25])
    found = enumerator.run(lambda: (enumerator.draw(p), enumerator.draw(p)))
    assert found == {(a, b): float(p[a] * p[b]) for a, b in itertools.product((0, 2, 3), repeat=2)}
