"""Proxies: each against an oracle, and all against what the search relies on."""

import importlib.util
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.ngram import save_table
from zerodraft.decoding.ngram_build import build_table
from zerodraft.decoding.proxies import ContextProxy, KenLMProxy, MixtureProxy, NgramProxy
from zerodraft.decoding.scorers import CausalProxy, ProxySession

V = 6
EVERYTHING = np.arange(V)
TEXT = [int(x) for x in np.random.default_rng(0).zipf(1.4, 300).clip(1, V) - 1]

needs_kenlm = pytest.mark.skipif(
    importlib.util.find_spec("kenlm") is None, reason="kenlm is not installed (it needs a C++ compiler)"
)


def table(order: int = 3) -> Any:
    return build_table([np.array(TEXT)], V, order=order)


def proxies() -> dict[str, CausalProxy]:
    return {
        "trigram": NgramProxy(table()),
        "unigram": NgramProxy(table(1)),
        "5-gram": NgramProxy(table(5)),
        "context": ContextProxy(V),
        "context of nothing": ContextProxy(V, order=1),
        "mixture": MixtureProxy([NgramProxy(table()), ContextProxy(V)], [1, 3]),
        "mixture of tables": MixtureProxy([NgramProxy(table()), NgramProxy(table(2))]),
    }


@pytest.mark.parametrize("name", list(proxies()))
def test_the_state_after_a_path_is_the_state_after_having_seen_it(name: str) -> None:
    """Except for a proxy that learns on the way; that one is told by `observe` alone."""
    proxy = proxies()[name]
    assert isinstance(proxy, CausalProxy)
    session, state = proxy.start(), None
    assert isinstance(session, ProxySession)
    for length in (0, 1, 2, 7):
        session = proxy.start()
        session.observe(TEXT[:length])
        state = session.root()
        for token in (3, 0, 3):
            state = session.advance(state, token)
        hash(state)
        if "context" in name or name == "mixture":
            continue
        after = proxy.start()
        after.observe([*TEXT[:length], 3, 0, 3])
        assert state == after.root()
        assert (session.score([state], EVERYTHING) == after.score([after.root()], EVERYTHING)).all()


@pytest.mark.parametrize("name", list(proxies()))
def test_probabilities_sum_to_one_after_every_path(name: str) -> None:
    session = proxies()[name].start()
    for start in range(0, 40, 8):
        states = [session.root(), session.advance(session.root(), 2)]
        states.append(session.advance(states[1], 5))
        scores = session.score(states, EVERYTHING)
        assert scores.dtype == np.float32
        assert (scores <= 0).all()
        np.testing.assert_allclose(np.exp(scores.astype(np.float64)).sum(1), 1, atol=1e-5)
        session.observe(TEXT[start : start + 8])


@pytest.mark.parametrize("name", ["trigram", "unigram", "mixture of tables"])
def test_the_table_of_a_lattice_agrees_with_scores(name: str) -> None:
    rng = np.random.default_rng(1)
    for known in (0, 1, 9):
        session = proxies()[name].start()
        session.observe(TEXT[:known])
        ids = rng.integers(0, V, (4, 3))
        parts = session.table(ids)
        assert parts is not None
        found = parts.pairs[:, None] + parts.extra
        states = {(): session.root()}
        for i in range(4):
            for path, state in list(states.items()):
                if len(path) == i:
                    a, b = (0, 0, *path)[-2:]
                    np.testing.assert_allclose(found[i, a, b], session.score([state], ids[i])[0], atol=3e-6)
                    states |= {(*path, c): session.advance(state, int(ids[i, c])) for c in range(3)}


@pytest.mark.parametrize("name", ["5-gram", "context", "mixture"])
def test_no_table_where_more_than_two_tokens_count(name: str) -> None:
    assert proxies()[name].start().table(np.zeros((2, 2), np.int64)) is None


def test_a_row_does_not_see_another_row() -> None:
    for proxy in proxies().values():
        one, two = proxy.start(), proxy.start()
        fresh = one.score([one.root()], EVERYTHING)
        one.observe(TEXT)
        assert (two.score([two.root()], EVERYTHING) == fresh).all()


def test_an_n_gram_proxy_refuses_another_vocabulary(tmp_path: Path) -> None:
    save_table(table(), tmp_path / "a.ngram")
    assert NgramProxy(tmp_path / "a.ngram", vocab_size=V).table.order == 3
    with pytest.raises(ZerodraftError, match=r"a\.ngram' was built for a vocabulary of 6 tokens, the target has 7"):
        NgramProxy(tmp_path / "a.ngram", vocab_size=V + 1)
    with pytest.raises(ZerodraftError, match="table was built for a vocabulary of 6"):
        NgramProxy(table(), vocab_size=5)


def witten_bell(text: Sequence[int], context: Sequence[int], token: int) -> float:
    """The definition, from the text each time."""
    shorter = witten_bell(text, context[1:], token) if context else 1 / V
    n = len(context)
    followers = [text[i] for i in range(n, len(text)) if list(text[i - n : i]) == list(context)]
    if not followers:
        return shorter
    counts = Counter(followers)
    return (counts[token] + len(counts) * shorter) / (len(followers) + len(counts))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, V - 1), max_size=6), max_size=6),
    st.lists(st.integers(0, V - 1), max_size=5),
    st.integers(1, 4),
)
def test_the_context_counts_itself_as_it_grows(steps: list[list[int]], path: list[int], order: int) -> None:
    session = ContextProxy(V, order=order).start()
    for step in steps:
        session.observe(step)
    text, state = [token for step in steps for token in step], session.root()
    for token in path:
        state = session.advance(state, token)
    context = [*text, *path][max(0, len(text) + len(path) - order + 1) :]
    wanted = [[witten_bell(text, context, token) for token in range(V)]]
    np.testing.assert_allclose(np.exp(session.score([state], EVERYTHING)), wanted, rtol=1e-5)


def test_a_mixture_is_the_weighted_mean() -> None:
    parts = [NgramProxy(table()), ContextProxy(V), NgramProxy(table(1))]
    mixed = MixtureProxy(parts, [2, 5, 3]).start()
    alone = [part.start() for part in parts]
    for session in (mixed, *alone):
        session.observe(TEXT[:20])
    wanted = sum(
        share * np.exp(session.score([session.root()], EVERYTHING))
        for share, session in zip((0.2, 0.5, 0.3), alone, strict=True)
    )
    np.testing.assert_allclose(np.exp(mixed.score([mixed.root()], EVERYTHING)), wanted, rtol=1e-5)


@pytest.mark.parametrize(("count", "weights"), [(0, None), (2, [1.0]), (1, [0.0]), (1, [-1.0]), (1, [math.nan])])
def test_mixtures_that_make_no_sense(count: int, weights: list[float] | None) -> None:
    with pytest.raises(ZerodraftError, match=f"mixture of {count} proxies"):
        MixtureProxy([ContextProxy(V)] * count, weights)


def test_context_proxies_that_make_no_sense() -> None:
    with pytest.raises(ZerodraftError, match="order=0"):
        ContextProxy(V, order=0)


# KenLM: an ARPA file made here, read by KenLM and by a few lines of Python


def arpa(path: Path, words: Sequence[str]) -> Path:
    """A random trigram model: numbers need not be probabilities for looking them up to be right."""
    rng = random.Random(0)
    grams = [[("<unk>",), ("<s>",), ("</s>",), *((word,) for word in words)]]
    for n in (2, 3):
        longer = [(*gram, word) for gram in grams[-1] if set(gram) <= set(words) for word in words]
        longer = [gram for gram in longer if n == 2 or gram[1:] in set(grams[1])]
        grams.append(sorted(rng.sample(longer, len(longer) // 2)))
    lines = ["\\data\\", *(f"ngram {n}={len(level)}" for n, level in enumerate(grams, 1)), ""]
    for n, level in enumerate(grams, 1):
        lines.append(f"\\{n}-grams:")
        for gram in level:
            backoff = f"\t{-rng.random():.4f}" if n < 3 and gram != ("</s>",) else ""
            lines.append(f"{-3 * rng.random() - 0.01:.4f}\t{' '.join(gram)}{backoff}")
        lines.append("")
    path.write_text("\n".join([*lines, "\\end\\", ""]), encoding="utf-8")
    return path


class Arpa:
    """Back-off as the format has it."""

    def __init__(self, path: Path) -> None:
        self.p: dict[tuple, float] = {}
        self.backoff: dict[tuple, float] = defaultdict(float)
        for line in path.read_text(encoding="utf-8").split("\n"):
            if re.match(r"-\d", line):
                p, words, *backoff = line.split("\t")
                gram = tuple(words.split())
                self.p[gram] = float(p)
                if backoff:
                    self.backoff[gram] = float(backoff[0])

    def log10(self, context: tuple, word: str) -> float:
        if (*context, word) in self.p:
            return self.p[(*context, word)]
        return self.backoff[context] + self.log10(context[1:], word) if context else self.p[("<unk>",)]


@needs_kenlm
def test_kenlm_scores_are_those_of_its_arpa_file(tmp_path: Path) -> None:
    path = arpa(tmp_path / "x.arpa", [str(token) for token in range(V)])
    oracle, proxy = Arpa(path), KenLMProxy(path)
    candidates = np.arange(V + 2)  # the last two are no words
    for known in range(6):
        session = proxy.start()
        session.observe(TEXT[:known])
        states, paths = [session.root()], [TEXT[:known]]
        for token in (2, 2, 5, 1):
            states.append(session.advance(states[-1], token))
            paths.append([*paths[-1], token])
        wanted = [
            [oracle.log10(tuple(map(str, path))[-2:], str(token)) * math.log(10) for token in candidates]
            for path in paths
        ]
        found = session.score(states, candidates)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
        assert found.dtype == np.float32
    assert session.table(np.zeros((2, 2), np.int64)) is None


@needs_kenlm
def test_kenlm_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ZerodraftError, match=r"no KenLM file at '.*no\.arpa'"):
        KenLMProxy(tmp_path / "no.arpa")
    (tmp_path / "foreign.bin").write_bytes(b"GGUF" + bytes(500))
    with pytest.raises(ZerodraftError, match=r"foreign\.bin' cannot be read as a KenLM model"):
        KenLMProxy(tmp_path / "foreign.bin")
    with pytest.raises(ZerodraftError, match=r"x\.arpa' are not token ids"):
        KenLMProxy(arpa(tmp_path / "x.arpa", ["the", "cat"]))


def test_without_kenlm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ZerodraftError, match=r"pip install 'zerodraft\[kenlm\]'"):
        KenLMProxy(tmp_path / "x.arpa")
