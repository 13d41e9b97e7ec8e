"""N-gram tables: smoothing against a plain oracle, lookups against each other, and damaged or foreign files."""

import itertools
import json
import os
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import NO_TOKEN
from zerodraft.decoding.ngram import PREAMBLE, NgramTable, open_table, save_table
from zerodraft.decoding.ngram_build import FALLBACK, build_table

V = 5
documents = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=8), min_size=1, max_size=30)


def arrays(docs: list[list[int]]) -> list[np.ndarray]:
    return [np.array(doc, np.uint16) for doc in docs]


class KneserNey:
    """The definition, word by word: a dictionary an order, recursion for a probability."""

    def __init__(self, docs: list[list[int]], order: int) -> None:
        self.counts: list[dict[tuple, int]] = []
        for n in range(1, order + 1):
            seen: dict[tuple, list] = defaultdict(list)
            for doc in docs:
                for i in range(len(doc) - n + 1):
                    seen[tuple(doc[i : i + n])].append(doc[i - 1] if i else "start")
            self.counts.append({gram: len(left if n == order else set(left)) for gram, left in seen.items()})
        self.discounts = [self.estimate(list(counts.values())) for counts in self.counts]

    @staticmethod
    def estimate(counts: list[int]) -> list[float]:
        n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return list(FALLBACK)
        y = n1 / (n1 + 2 * n2)
        found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return found if min(found) > 0 else list(FALLBACK)

    def p(self, context: tuple, token: int) -> float:
        n = len(context) + 1
        shorter = self.p(context[1:], token) if context else 1 / V
        after = {gram[-1]: count for gram, count in self.counts[n - 1].items() if gram[:-1] == context}
        if not after:
            return shorter
        total = sum(after.values())
        D = self.discounts[n - 1]
        taken = sum(D[min(count, 3) - 1] for count in after.values())
        own = after[token] - D[min(after[token], 3) - 1] if token in after else 0
        return own / total + taken / total * shorter


@settings(max_examples=25, deadline=None)
@given(documents, st.integers(1, 4))
def test_probabilities_are_those_of_the_definition(docs: list[list[int]], order: int) -> None:
    table = build_table(arrays(docs), V, order=order, chunk=16)
    oracle = KneserNey(docs, order)
    for length in range(order):
        contexts = list(itertools.product(range(V), repeat=length))
        found = table.score(np.array(contexts, np.int64).reshape(len(contexts), length), np.arange(V))
        wanted = [[oracle.p(context, token) for token in range(V)] for context in contexts]
        np.testing.assert_allclose(np.exp(found), wanted, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(documents, st.integers(1, 5), st.integers(1, 3))
def test_probabilities_sum_to_one_whatever_was_seen(docs: list[list[int]], order: int, min_count: int) -> None:
    table = build_table(arrays(docs), V, order=order, min_count=min_count)
    contexts = np.array(list(itertools.product(range(-1, V), repeat=4)), np.int64)
    scores = table.score(contexts, np.arange(V)).astype(np.float64)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-5)
    assert (scores <= 0).all()


@settings(max_examples=30, deadline=None)
@given(
    documents,
    st.integers(1, 3),
    st.lists(st.integers(-1, V), max_size=4),
    st.integers(0, 6),
    st.integers(1, 4),
    st.data(),
)
def test_a_lattice_at_once_is_a_lattice_one_by_one(
    docs: list[list[int]], order: int, before: list[int], k: int, m: int, data: st.DataObject
) -> None:
    table = build_table(arrays(docs), V, order=order)
    cells = data.draw(st.lists(st.integers(NO_TOKEN, V), min_size=k * m, max_size=k * m))
    ids = np.array(cells, np.int64).reshape(k, m)
    found = table.lattice(np.array(before, np.int64), ids)
    assert found is not None
    scores = found.pairs[:, None] + found.extra
    assert np.isfinite(scores).all()
    known = [NO_TOKEN, NO_TOKEN, *before]
    for i, a, b in itertools.product(range(k), range(m), range(m)):
        context = [ids[i - 2, a] if i > 1 else known[len(known) - 2 + i], ids[i - 1, b] if i else known[-1]]
        wanted = table.score(np.array([context]), ids[i])[0]
        tokens = (ids[i] >= 0) & (ids[i] < V)
        np.testing.assert_allclose(scores[i, a, b][tokens], wanted[tokens], atol=2e-6)


def test_a_longer_memory_than_two_tokens_has_no_lattice_at_once() -> None:
    table = build_table(arrays([[0, 1, 2, 3, 4] * 3]), V, order=4)
    assert table.lattice(np.array([0, 1]), np.zeros((2, 2), np.int64)) is None


def test_tokens_that_are_none_are_never_found() -> None:
    """Their keys must not be those of other n-grams."""
    rng = np.random.default_rng(0)
    table = build_table([rng.integers(0, V, 400)], V)
    for bad in (NO_TOKEN, V, V + 1, 10**6):
        unseen = table.score(np.array([[bad, bad]]), np.arange(V))
        assert (unseen == table.score(np.empty((1, 0), np.int64), np.arange(V))).all()
        after = table.score(np.array(list(itertools.product(range(V), repeat=2))), np.array([bad]))
        assert np.isfinite(after).all()
        clipped = table.log_p[min(max(bad, 0), V - 1)]
        assert (after <= clipped).all()


def test_many_n_grams_are_all_found_and_others_are_not() -> None:
    rng = np.random.default_rng(1)
    text = rng.zipf(1.3, 9_000).clip(1, 600) - 1
    table = build_table([text], 600, chunk=2_000)
    pairs = text[:-1] * 600 + text[1:]
    # a document longer than a chunk is cut; the pairs across the cuts are not counted
    counted = np.unique(np.delete(pairs, np.arange(1_999, len(pairs), 2_000)))
    asked = np.arange(600 * 600)
    hits, at = table.levels[0].find(asked)
    assert (hits == counted).all()
    assert (np.sort(at) == np.arange(len(counted))).all()


def test_wide_keys() -> None:
    """More than 2 ** 32 pairs are possible."""
    text = np.array([70_000, 3, 99_999, 70_000, 3, 5, 0, 99_999, 70_000, 3])
    table = build_table([text], 100_000)
    assert [level.keys.dtype.str for level in table.levels] == ["<i8", "<u4"]
    scores = table.score(np.array([[70_000, 3]]), np.array([99_999, 5, 7, 70_000]))[0]
    assert scores.argsort().tolist()[-2:] == [1, 0]


def test_pruning_drops_what_was_seen_once() -> None:
    docs = arrays([[0, 1, 2], [0, 1, 2], [0, 1, 3]])
    assert build_table(docs, V).counts == (V, 3, 2)
    assert build_table(docs, V, min_count=2).counts == (V, 3, 1)
    assert build_table(docs, V, min_count=9).counts == (V, 3, 0)


def test_progress_reaches_all_tokens_in_every_pass() -> None:
    seen: dict[str, list[int]] = defaultdict(list)
    build_table(arrays([[0, 1, 2]] * 10), V, on_progress=lambda stage, done: seen[stage].append(done), chunk=9)
    assert all(done == sorted(done) and done[-1] == 30 for done in seen.values())
    assert next(iter(seen)) == "tokens"
    assert len(seen["tokens"]) > 2


@pytest.mark.parametrize(
    ("docs", "options", "message"),
    [
        ([], {}, "nothing to count"),
        ([[]], {}, "nothing to count"),
        ([[0, V]], {}, f"token {V}, but the vocabulary only tokens 0 to {V - 1}"),
        ([[0, 1]], {"order": 0}, "order of an n-gram table is 0"),
        ([[0, 1]], {"order": 99}, "order of an n-gram table is 99"),
        ([[0, 1]], {"min_count": 0}, "min_count is 0"),
    ],
)
def test_what_cannot_be_built(docs: list[list[int]], options: dict[str, int], message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        build_table(arrays(docs), V, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    save_table(build_table([rng.integers(0, V, 200)], V, about={"source": "dice"}), tmp_path / "x.ngram")
    return tmp_path / "x.ngram"


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_saved_table_is_the_same_table(tmp_path: Path, order: int) -> None:
    rng = np.random.default_rng(3)
    built = build_table([rng.integers(0, V, 300)], V, order=order, about={"source": "dice"})
    size = save_table(built, tmp_path / "deep" / "x.ngram")
    read = open_table(tmp_path / "deep" / "x.ngram")
    assert size == (tmp_path / "deep" / "x.ngram").stat().st_size
    assert (read.order, read.vocab_size, read.counts, read.about) == (order, V, built.counts, built.about)
    contexts = np.array(list(itertools.product(range(V), repeat=3)))
    assert (read.score(contexts, np.arange(V)) == built.score(contexts, np.arange(V))).all()
    assert os.listdir(tmp_path / "deep") == ["x.ngram"]


def test_arrays_are_mapped_and_aligned(saved: Path) -> None:
    table = open_table(saved)
    for array in (table.log_p, table.levels[0].keys, table.levels[1].log_p):
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = build_table(arrays([[0, 1, 2]]), V)
    save_table(table, tmp_path / "x.ngram")
    before = (tmp_path / "x.ngram").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_table(build_table(arrays([[3, 4]]), V), tmp_path / "x.ngram")
    assert os.listdir(tmp_path) == ["x.ngram"]
    assert (tmp_path / "x.ngram").read_bytes() == before


def test_files_cut_short_anywhere(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in [*range(0, PREAMBLE.size + 8), len(whole) // 2, len(whole) - 1]:
        saved.write_bytes(whole[:length])
        with pytest.raises(ZerodraftError, match=r"is not an n-gram table|cut short or damaged"):
            open_table(saved)
    saved.write_bytes(whole + b"x")
    with pytest.raises(ZerodraftError, match="cut short or damaged"):
        open_table(saved)


def test_a_changed_preamble_or_header_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    (header_size,) = struct.unpack_from("<I", whole, 12)
    header = json.loads(whole[PREAMBLE.size : PREAMBLE.size + header_size])
    assert header["order"] == 3
    for at in [*range(PREAMBLE.size), *range(PREAMBLE.size, PREAMBLE.size + header_size, 17)]:
        changed = bytearray(whole)
        changed[at] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(ZerodraftError, match=r"x\.ngram"):
            open_table(saved)


def test_another_version_is_named(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    struct.pack_into("<I", whole, 8, 77)
    saved.write_bytes(whole)
    with pytest.raises(ZerodraftError, match="has format 77, this version of zerodraft reads 1"):
        open_table(saved)


def test_a_changed_body_cannot_lead_out_of_bounds(saved: Path) -> None:
    """Each array in turn filled with dice; what cannot be used is noticed, the rest gives some number."""
    whole = saved.read_bytes()
    (header_size,) = struct.unpack_from("<I", whole, 12)
    arrays = json.loads(whole[PREAMBLE.size : PREAMBLE.size + header_size])["arrays"]
    rng = np.random.default_rng(4)
    contexts = np.array(list(itertools.product(range(V), repeat=2)))
    noticed = set()
    for name, (kind, count, offset) in arrays.items():
        size = np.dtype(kind).itemsize * count
        changed = saved.with_name(f"{name}.ngram")
        changed.write_bytes(whole[:offset] + rng.bytes(size) + whole[offset + size :])
        try:
            with np.errstate(all="ignore"):
                open_table(changed).score(contexts, np.arange(V))
        except ZerodraftError as error:
            noticed.add((name, "cut short or damaged" in str(error)))
    assert noticed == {("2.start", True), ("3.start", True)}


@pytest.mark.parametrize("kind", ["missing", "directory", "foreign"])
def test_what_is_no_table(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "no.ngram"
    if kind == "directory":
        path.mkdir()
    if kind == "foreign":
        path.write_bytes(b"GGUF" + bytes(4000))
    with pytest.raises(ZerodraftError, match=r"no\.ngram'.* build one with 'zerodraft ngram build'"):
        open_table(path)


def test_a_table_may_be_empty_above_order_one() -> None:
    table = build_table(arrays([[0], [1], [1]]), V)
    assert table.counts == (V, 0, 0)
    scores = table.score(np.array([[0, 1]]), np.arange(V))[0]
    assert scores[1] == scores.max()
    assert isinstance(table, NgramTable)
