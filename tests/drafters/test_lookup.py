"""Prompt lookup against a naive search, case by case and on random texts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import NO_TOKEN
from zerodraft.decoding.protocols import Drafter, DraftSession, Progress
from zerodraft.drafters.lookup import PromptLookupDrafter, lookup, matches


def oracle(text: list[int], length: int, max_ngram: int, min_ngram: int, candidates: int) -> list[dict[int, float]]:
    """Per position each candidate with its probability, read off the definition."""
    found = [
        (size, start)
        for start in range(1, len(text))
        for size in [
            max(n for n in range(max_ngram + 1) if n <= start and text[start - n : start] == text[len(text) - n :])
        ]
        if size >= min_ngram
    ]
    starts = [start for _, start in sorted(found, reverse=True)]
    weights = {start: 0.5**rank for rank, start in enumerate(starts)}
    rows, text = [], list(text)
    for position in range(length if starts else 0):
        best = text[starts[0] + position]
        total = sum(weights[start] for start in starts)
        row: dict[int, float] = {}
        for start in starts:
            token = text[start + position]
            row[token] = row.get(token, 0.0) + weights[start] / total
        rows.append(dict(sorted(row.items(), key=lambda item: -item[1])[:candidates]))
        starts = [start for start in starts if text[start + position] == best]
        text.append(best)
    return rows


@settings(deadline=None)
@given(
    text=st.lists(st.integers(0, 3), max_size=24),
    length=st.integers(0, 9),
    ngrams=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    candidates=st.integers(1, 4),
)
def test_it_is_the_naive_search(text: list[int], length: int, ngrams: list[int], candidates: int) -> None:
    found = lookup(np.array(text, np.int64), length, max_ngram=ngrams[1], min_ngram=ngrams[0], candidates=candidates)
    expected = oracle(text, length, ngrams[1], ngrams[0], candidates)
    assert found.chain or not len(found)
    assert len(found) == len(expected)
    for ids, log_q, row in zip(found.ids, found.log_q, expected, strict=True):
        count = int((ids != NO_TOKEN).sum())
        assert ids[:count].tolist() == list(row)
        assert np.exp(log_q[:count]) == pytest.approx(list(row.values()), rel=1e-5)
        assert (log_q[count:] == -np.inf).all()


def test_the_longest_match_leads_and_then_the_latest() -> None:
    text = np.array([7, 8, 9, 1, 9, 2, 8, 9, 3, 9, 4, 8, 9])
    assert matches(text, 3, 1)[0].tolist() == [8, 3, 10, 5]
    found = lookup(text, 2)
    assert found.ids[:, 0].tolist() == [3, 9]
    assert found.ids[0].tolist() == [3, 1, 4, 2]


def test_a_copy_runs_on_into_itself() -> None:
    assert lookup(np.array([5, 1, 2, 1, 2]), 6).ids[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
    assert lookup(np.array([4, 4]), 3).ids[:, 0].tolist() == [4, 4, 4]


def test_many_matches_do_not_overflow() -> None:
    found = lookup(np.zeros(5000, np.int64), 3)
    assert found.ids[:, 0].tolist() == [0, 0, 0]
    assert np.isfinite(found.log_q[:, 0]).all()


def progress(*rows: list[int]) -> list[Progress]:
    return [Progress(torch.tensor(row, dtype=torch.int64), None) for row in rows]


def test_a_session_follows_each_row() -> None:
    drafter = PromptLookupDrafter(max_length=4)
    assert isinstance(drafter, Drafter)
    session = drafter.start(2, torch.device("cpu"), None)
    assert isinstance(session, DraftSession)
    session.observe(progress(list(range(300)), [1, 2]))
    assert [len(lattice) for lattice in session.propose([3, 3])] == [0, 0]
    session.observe(progress([17, 18], []))
    first, second = session.propose([9, 0])
    assert first.ids[:, 0].tolist() == [19, 20, 21, 22]
    assert len(second) == 0
    session.observe(progress([19, 5], [1]))
    first, second = session.propose([2, 2])
    assert first.ids[:, 0].tolist() == [6, 7]
    assert second.ids[:, 0].tolist() == [2, 1]


@pytest.mark.parametrize("options", [{"min_ngram": 0}, {"max_ngram": 1, "min_ngram": 2}, {"candidates": 0}])
def test_impossible_options(options: dict[str, int]) -> None:
    with pytest.raises(ZerodraftError, match="Prompt lookup with"):
        PromptLookupDrafter(**options)
