"""Recorded drafts are those of the usual path: on the tape that stands in for a CUDA graph, and on CUDA."""

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tests.drafters.four_tokens import drafter_for, talkative
from tests.drafters.recording import CLOSE, STEPS, Telling, apart, check_recorded, pair_of
from tests.fast.tape import Tape, Taped
from zerodraft.decoding.lengths import FixedLength
from zerodraft.decoding.protocols import Progress
from zerodraft.drafters import block
from zerodraft.fast.recorded import RecordingError
from zerodraft.generate.huggingface import DiffuSpec

CPU, COPY = torch.device("cpu"), "index_copy_"


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and products by torch, attention over the whole cache, and small caches at first."""
    monkeypatch.setattr("zerodraft.drafters.block_layers.kernels", lambda: None)
    monkeypatch.setattr("zerodraft.fast.packed.kernels", lambda: None)
    monkeypatch.setattr("zerodraft.fast.packed._pack", lambda weight: None)
    monkeypatch.setattr("zerodraft.drafters.block_layers.reach", lambda device, end, positions: positions)
    monkeypatch.setattr(block, "FIRST_ROOM", 32)


KINDS = [("qwen2", 0, torch.float32), ("qwen3", 8, torch.float32), ("qwen2", 8, torch.bfloat16)]
"""Families with biases and with norms of queries and keys, widths of the coupling."""


@pytest.mark.parametrize(("family", "coupling", "dtype"), KINDS)
def test_recorded_drafts_are_the_usual_ones(family: str, coupling: int, dtype: torch.dtype) -> None:
    check_recorded(*pair_of(family, coupling, Taped, dtype=dtype))


def test_a_text_is_drafted_for_with_what_an_earlier_one_recorded() -> None:
    recorded, usual = pair_of("llama", 8, Taped)
    made, counts = Taped.made, []
    for seed in (0, 1, 2):
        check_recorded(recorded, usual, seed)
        counts.append(Taped.made - made)
    # two sizes of drafts at three of caches and one at the fourth; then the largest cache, with what is missing of it
    assert counts[0] >= 4
    assert counts[2] == counts[1] <= counts[0] + 1
    recorded.release()
    check_recorded(recorded, usual)
    assert Taped.made - made > counts[2]
    held = Taped.made
    recorded.embedding.data = recorded.embedding.data.clone()
    check_recorded(recorded, usual)
    assert Taped.made > held


def test_two_texts_at_a_time_do_not_share() -> None:
    recorded, usual = pair_of("llama", 8, Taped)
    tellings = [Telling(recorded, seed) for seed in (0, 1)]
    sessions = [[drafter.start(1, CPU, None) for drafter in (recorded, usual)] for _ in tellings]
    for new, length in STEPS:
        for telling, pair in zip(tellings, sessions, strict=True):
            if lattices := telling.step(new, length, pair):
                assert apart(*lattices) < CLOSE[torch.float32]


def test_a_lattice_stays_as_it_is_when_the_next_one_is_drafted() -> None:
    recorded, _ = pair_of("llama", 8, Taped)
    telling, session = Telling(recorded), recorded.start(1, CPU, None)
    (first,) = telling.step(6, 4, [session])
    before = first.log_q.copy()
    (second,) = telling.step(2, 4, [session])
    assert np.array_equal(first.log_q, before)
    assert not np.array_equal(first.log_q, second.log_q)


def test_nothing_of_a_text_is_left_for_the_next() -> None:
    recorded, usual = pair_of("llama", 8, Taped)
    telling, session = Telling(recorded), recorded.start(1, CPU, None)
    telling.states.fill_(torch.nan)
    for new in (40, 1):
        telling.step(new, 4, [session])
    del session
    assert recorded._idle
    check_recorded(recorded, usual)


def test_no_column_is_written_twice() -> None:
    """A GPU does so in any order."""
    written: list[list[int]] = []

    class Watching(Taped):
        def __call__(self, run: Any) -> Any:
            with Tape() as tape:
                run()
            written.extend(args[2].tolist() for func, args, *_ in tape.calls if func.overloadpacket.__name__ == COPY)
            return super().__call__(run)

    check_recorded(*pair_of("llama", 0, Watching))
    assert written
    assert all(len(set(columns)) == len(columns) for columns in written)


def test_a_recording_that_fails_is_said_once_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Taped):
        def __call__(self, run: Any) -> Any:
            raise RecordingError("operation not permitted when stream is capturing")

    recorded, usual = pair_of("llama", 8, Failing)
    with caplog.at_level(logging.WARNING):
        for seed in (0, 1):
            telling = Telling(recorded, seed)
            sessions = [drafter.start(1, CPU, None) for drafter in (recorded, usual)]
            for new, length in STEPS:
                if lattices := telling.step(new, length, sessions):
                    assert apart(*lattices) == 0
    assert caplog.text.count("could not be recorded: operation not permitted when stream is capturing") == 1


def test_what_is_not_recorded() -> None:
    made = Taped.made
    recorded, _ = pair_of("llama", 8, Taped)
    rows, telling = recorded.start(2, CPU, None), Telling(recorded)
    rows.observe([Progress(telling.ids[:5], telling.states[:4])] * 2)
    assert apart(*rows.propose([4, 4])) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert recorded._recording() is None
    rotary: Any = recorded.model.rotary
    rotary.rope_type = "dynamic"
    assert recorded._recording() is None
    assert Taped.made == made
    assert drafter_for(talkative(), 0).recorder is None


@pytest.mark.parametrize(("tree", "coupling"), [(True, 4), (False, 0)])
def test_greedy_tokens_are_those_of_generate(tree: bool, coupling: int) -> None:
    target = talkative()
    drafter = drafter_for(target, coupling)
    drafter.recorder = Taped
    made = Taped.made
    prompt = torch.randint(4, (1, 9), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    spec = DiffuSpec(drafter, length=FixedLength(3), tree=tree)
    plain = target.generate(prompt, **options)
    assert torch.equal(plain, target.generate(prompt, custom_generate=spec, **options))
    assert spec.last_stats is not None
    assert spec.last_stats.accepted > 5
    assert Taped.made > made


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
@pytest.mark.parametrize(("family", "coupling", "dtype"), KINDS)
def test_cuda_graphs_draft_what_the_usual_path_drafts(family: str, coupling: int, dtype: torch.dtype) -> None:
    recorded, usual = pair_of(family, coupling, None, "cuda", dtype)
    for seed in (0, 1):  # the second text replays what the first one recorded
        check_recorded(recorded, usual, seed)
