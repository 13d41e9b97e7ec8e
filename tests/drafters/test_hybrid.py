"""Copies beside another drafter's drafts: what is copied, how far it is trusted, when the other drafter is asked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.drafters import NoisyDrafter
from zerodraft.decoding.fallback import Fallback
from zerodraft.decoding.protocols import CopyingSession, Drafter, DraftSession, Progress
from zerodraft.drafters.hybrid import FIRST_RATES, CopyTrust, HybridDrafter, HybridSession, copy


def plain_copy(text: list[int], length: int, max_ngram: int) -> tuple[list[int], int]:
    best, start = 0, -1
    for end in range(1, len(text)):
        agreed = 0
        while agreed < min(max_ngram, end) and text[end - 1 - agreed] == text[-1 - agreed]:
            agreed += 1
        if agreed and agreed >= best:
            best, start = agreed, end
    grown = list(text)
    for _ in range(length if best else 0):
        grown.append(grown[start + len(grown) - len(text)])
    return grown[len(text) :], best if length else 0


@settings(deadline=None)
@given(text=st.lists(st.integers(0, 2), max_size=30), length=st.integers(0, 9), max_ngram=st.integers(1, 6))
def test_a_copy_is_what_followed_the_longest_agreement(text: list[int], length: int, max_ngram: int) -> None:
    tokens, agreement = copy(np.array(text, np.int64), length, max_ngram)
    expected, best = plain_copy(text, length, max_ngram)
    assert tokens.tolist() == expected
    assert agreement == (best if expected else 0)


def test_trust_grows_with_the_agreement_and_learns() -> None:
    trust = CopyTrust(weight=2.0, keep=1.0)
    assert trust.rates(2, 3) == pytest.approx(FIRST_RATES[1:4])
    assert trust.rates(11, 4) == pytest.approx([*FIRST_RATES[10:], FIRST_RATES[-1], FIRST_RATES[-1]])
    # after an agreement of 2: right, right, wrong; what comes after says nothing
    trust.learn(2, np.array([5, 6, 7, 8]), np.array([5, 6, 9, 8]))
    right, wrong = [(1 + 2 * FIRST_RATES[i]) / 3 for i in (1, 2)], 2 * FIRST_RATES[3] / 3
    assert trust.rates(1, 5) == pytest.approx([FIRST_RATES[0], *right, wrong, FIRST_RATES[4]])
    # a copy that was cut short by the end of what is known
    trust.learn(1, np.array([4, 4]), np.array([4]))
    assert trust.rates(1, 2) == pytest.approx([(1 + 2 * FIRST_RATES[0]) / 3, right[0]])


def start(text: list[int], least_gain: float | None) -> DraftSession:
    other = NoisyDrafter([[*text, *range(50, 80)]], 100, right=1.0, max_length=4)
    drafter = HybridDrafter(other=other, max_length=6, least_gain=least_gain)
    assert isinstance(drafter, Drafter)
    session = drafter.start(1, torch.device("cpu"), None)
    session.observe([Progress(torch.tensor(text), None)])
    return session


def test_both_drafts_stand_side_by_side() -> None:
    (lattice,) = start([1, 2, 3, 9, 8, 1, 2, 3], least_gain=0.0).propose([6])
    copied, draft = sorted(lattice.parts(), key=lambda part: not part.chain)
    assert copied.chain
    assert copied.ids[:, 0].tolist() == [9, 8, 1, 2, 3, 9]
    assert copied.log_q[:, 0] == pytest.approx(np.log(FIRST_RATES[2:8]), rel=1e-5)
    assert draft.ids[:, 0].tolist() == [50, 51, 52, 53]  # as many as the other drafter fills
    assert lattice.log_q[0, 0] == max(part.log_q[0, 0] for part in lattice.parts())


def test_the_other_drafter_is_asked_where_it_can_add_enough() -> None:
    repeating = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13] * 2
    (lattice,) = start(repeating, least_gain=0.05).propose([6])
    assert lattice.chain
    assert lattice.beside is None
    (lattice,) = start([1, 2, 3], least_gain=0.05).propose([6])  # nothing to copy
    assert not lattice.chain
    assert len(lattice) == 4
    assert lattice.beside is None


def test_wrong_copies_bring_the_other_drafter_back() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13] * 2
    session = start(text, least_gain=0.05)
    asked = []
    for i in range(40):
        (lattice,) = session.propose([6])
        asked.append(len(lattice.parts()) > 1 or not lattice.chain)
        session.observe([Progress(torch.tensor([text[i % 13] if i < 3 else text[(5 * i) % 13]]), None)])
    assert not any(asked[:3])
    assert any(asked[3:])


@pytest.mark.parametrize(("tokens", "seconds", "share"), [((1, 2), (1.0, 1.5), 1.0), ((1, 2), (1.0, 2.5), 0.04)])
def test_the_other_drafter_is_asked_while_it_pays(
    tokens: tuple[int, int], seconds: tuple[float, float], share: float
) -> None:
    trial, asked = Fallback(), []
    for _ in range(400):
        asked.append(trial.longest() > 0)
        trial.learn(int(asked[-1]), tokens[asked[-1]], seconds[asked[-1]])
    assert np.mean(asked[100:]) == pytest.approx(share, abs=0.04)
    for _ in range(1200):  # the other way round: what was learnt fades
        asked.append(trial.longest() > 0)
        trial.learn(int(asked[-1]), tokens[asked[-1]], 3 - seconds[asked[-1]] if asked[-1] else 1.0)
    if share < 0.5:
        assert np.mean(asked[-100:]) > 0.8


def test_a_plain_step_teaches_nothing() -> None:
    session = start([3, 9, 8, 7, 3], least_gain=None)
    assert isinstance(session, HybridSession)
    session.propose([6])
    session.observe([Progress(torch.tensor([9, 8, 4]), None)])
    (row,) = session.rows
    known = (session.gain, row.trust.rates(1, 12).tolist())
    session.observe([Progress(torch.tensor([9]), None)])  # no draft before it
    assert (session.gain, row.trust.rates(1, 12).tolist()) == known
    assert row.text.tokens[-4:].tolist() == [9, 8, 4, 9]


def test_it_says_what_was_asked_of_the_other_drafter() -> None:
    session = start([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13] * 2, least_gain=None)
    assert isinstance(session, CopyingSession)
    session.propose([6])
    assert session.asked is None  # nothing to gain
    session.observe([Progress(torch.tensor([40]), None)])
    for longest in (0, 3, 9):
        session.longest = longest
        (lattice,) = session.propose([6])  # nothing to copy
        assert session.asked == len(lattice) == min(longest, 4)
        session.observe([Progress(torch.tensor([41 + longest]), None)])


def test_nothing_is_wanted() -> None:
    (lattice,) = start([1, 2, 1, 2], least_gain=0.0).propose([0])
    assert not len(lattice)
