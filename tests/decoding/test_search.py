"""Path search: the vectorised version against plain readable ones, and its promises one by one.

The oracles below are the definition. Log-probabilities in the made-up cases are multiples of 1/8, so that sums are
exact in any order and results have to be equal, ties included.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.paths import path_to
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import NO_TOKEN, Lattice
from zerodraft.decoding.scorers import LatticeScores, ProxySession
from zerodraft.decoding.search import (
    SearchConfig,
    beam,
    best_first,
    build_tree,
    merge,
    prune,
    sample_draft,
)
from zerodraft.decoding.verify import Dice

EOS = (0, 7)

# Oracles


def plain_prune(lattice: Lattice, tau: float, m_max: int, eos: tuple[int, ...]) -> list[list[tuple[int, float]]]:
    positions = []
    for ids, log_q in zip(lattice.ids.tolist(), lattice.log_q.tolist(), strict=True):
        candidates = [(token, score) for token, score in zip(ids, log_q, strict=True) if token != NO_TOKEN]
        if not candidates:
            break
        kept, mass = [], 0.0
        for token, score in candidates:
            if (not kept or mass < tau) and len(kept) < m_max:
                kept.append((token, score))
            mass += math.exp(score)
        kept += [c for c in candidates if c[0] in eos and c not in kept]
        positions.append(kept)
        if candidates[0][0] in eos:
            break
    return positions


def plain_beam(lattice: Lattice, width: int, lam: float, proxy: ProxySession | None) -> list[tuple[list[int], float]]:
    paths: list[tuple[list[int], float]] = [([], 0.0)]
    for candidates in rows(lattice):
        longer = []
        for path, score in paths:
            for token, _ in candidates:
                own = log_q(lattice, path, token)
                step = own if proxy is None else lam * own + (1 - lam) * log_p(proxy, path, token)
                longer.append(([*path, token], score + step))
        paths = sorted(longer, key=lambda scored: -scored[1])[:width]  # stable, as ties go to the drafter's order
    return paths


def log_p(proxy: ProxySession, path: list[int], token: int) -> float:
    state = proxy.root()
    for before in path:
        state = proxy.advance(state, before)
    return float(proxy.score([state], np.array([token]))[0, 0])


def log_q(lattice: Lattice, path: list[int], token: int) -> float:
    """The drafter's score of a token after a path."""
    i = len(path)
    at = lattice.ids[i].tolist().index(token)
    if lattice.pairs is None:
        return float(lattice.log_q[i, at])
    return float(lattice.pairs[i, lattice.ids[i - 1].tolist().index(path[-1]) if i else 0, at])


def all_prefixes(
    lattice: Lattice,
    lam: float,
    proxy: ProxySession | None,
    eos: tuple[int, ...],
) -> dict[tuple[int, ...], float]:
    """Every prefix through the positions that passes no EOS, with its score."""
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    heads: list[tuple[int, ...]] = [()]
    for candidates in rows(lattice):
        following = []
        for head, (rank, (token, _)) in itertools.product(heads, enumerate(candidates)):
            if token in eos:
                continue
            own = log_q(lattice, list(head), token)
            step = own if proxy is None else lam * own + (1 - lam) * log_p(proxy, list(head), token)
            scores[(*head, token)] = scores[head] + step
            if not lattice.chain or rank == 0:
                following.append((*head, token))
        heads = following
    del scores[()]
    return scores


# Made-up cases


class TrigramProxy:
    """Random scores of a token after two others."""

    def __init__(self, seed: int, *, tabled: bool) -> None:
        self.log_p = -np.random.default_rng(seed).integers(0, 80, (30, 30, 30)).astype(np.float32) / 8
        self.tabled = tabled
        self.known = (1, 2)

    def observe(self, tokens: list[int]) -> None:
        self.known = (*self.known, *tokens)[-2:]

    def root(self) -> tuple[int, ...]:
        return self.known

    def score(self, states: list[tuple[int, ...]], candidates: np.ndarray) -> np.ndarray:
        return np.stack([self.log_p[state][candidates] for state in states])

    def advance(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (state[1], token)

    def table(self, ids: np.ndarray) -> LatticeScores | None:
        if not self.tabled:
            return None
        k, m = ids.shape
        before = np.concatenate([np.repeat(np.array(self.known)[:, None], m, 1), ids])
        full = np.stack([self.log_p[before[i][:, None, None], before[i + 1][:, None], ids[i]] for i in range(k)])
        pairs = full[:, 0].copy()
        return LatticeScores(pairs, full - pairs[:, None])


@st.composite
def lattices(draw: st.DrawFn, max_k: int = 5, max_m: int = 5, *, chain: bool = False, paired: bool = False) -> Lattice:
    k, m = draw(st.integers(0, max_k)), draw(st.integers(1, max_m))
    ids, log_q = np.full((k, m), NO_TOKEN, np.int64), np.full((k, m), -np.inf, np.float32)
    for i in range(k):
        n = draw(st.integers(1, m))
        ids[i, :n] = draw(st.permutations(range(10)))[:n]
        log_q[i, :n] = -np.array(sorted(draw(st.lists(st.integers(0, 40), min_size=n, max_size=n)))) / 8
    if not paired:
        return Lattice(ids, log_q, chain)
    pairs = -np.random.default_rng(draw(st.integers(0, 99))).integers(0, 40, (k, m, m)).astype(np.float32) / 8
    pairs[:1] = pairs[:1, :1]
    return Lattice(ids, log_q, pairs=pairs)


def rows(lattice: Lattice) -> list[list[tuple[int, float]]]:
    return [
        [(t, s) for t, s in zip(ids, scores, strict=True) if t != NO_TOKEN]
        for ids, scores in zip(lattice.ids.tolist(), lattice.log_q.tolist(), strict=True)
    ]


LAMS = st.sampled_from([0.0, 0.5, 0.75, 1.0])


@settings(deadline=None)
@given(
    lattice=lattices() | lattices(paired=True),
    tau=st.sampled_from([0.0, 0.31, 0.8, 1.0]),
    m_max=st.integers(1, 6),
    eos=st.booleans(),
)
def test_pruning_is_the_definition(lattice: Lattice, tau: float, m_max: int, eos: bool) -> None:
    eos_ids = EOS if eos else ()
    pruned = prune(lattice, SearchConfig(tau=tau, m_max=m_max), eos_ids)
    assert rows(pruned) == plain_prune(lattice, tau, m_max, eos_ids)
    assert ((pruned.ids == NO_TOKEN) == np.isneginf(pruned.log_q)).all()
    for path in itertools.product(*([token for token, _ in row] for row in rows(pruned)[:3])):
        for i, token in enumerate(path):
            assert log_q(pruned, list(path[:i]), token) == log_q(lattice, list(path[:i]), token)


@settings(max_examples=60, deadline=None)
@given(
    lattice=lattices() | lattices(paired=True),
    width=st.integers(1, 5),
    lam=LAMS,
    seed=st.integers(0, 9),
    kind=st.integers(0, 2),
)
def test_the_beam_is_the_definition(lattice: Lattice, width: int, lam: float, seed: int, kind: int) -> None:
    proxy = None if kind == 0 else TrigramProxy(seed, tabled=kind == 1)
    config = SearchConfig(tau=1.0, beam=width, lam=lam)
    pruned = prune(lattice, config)
    found = beam(pruned, config, proxy)
    assert [(path.tokens, path.score) for path in found] == plain_beam(pruned, width, lam, proxy)


@settings(max_examples=60, deadline=None)
@given(
    lattice=lattices(max_k=4, max_m=3)
    | lattices(max_k=4, max_m=3, chain=True)
    | lattices(max_k=4, max_m=3, paired=True),
    budget=st.integers(1, 12),
    lam=LAMS,
    seed=st.integers(0, 9),
    kind=st.integers(0, 2),
)
def test_best_first_holds_the_best_prefixes(lattice: Lattice, budget: int, lam: float, seed: int, kind: int) -> None:
    proxy = None if kind == 0 else TrigramProxy(seed, tabled=kind == 1)
    config = SearchConfig(tau=1.0, lam=lam)
    pruned = prune(lattice, config, EOS)
    tree, chances = best_first(pruned, config, budget, proxy, EOS)
    every = all_prefixes(pruned, lam, None if lattice.chain else proxy, EOS)
    held = [tuple(path_to(tree, node)) for node in range(len(tree))]
    assert len(set(held)) == len(held)
    np.testing.assert_allclose(chances, np.exp([every[path] for path in held]), rtol=1e-5)
    # by their scores: which of several equal prefixes is in does not matter
    assert [every[path] for path in held] == sorted(every.values(), reverse=True)[:budget]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(lattices(max_k=3, max_m=3) | lattices(max_k=4, max_m=2, chain=True), min_size=1, max_size=3),
    budget=st.integers(1, 12),
)
def test_merged_trees_hold_the_likeliest_nodes_of_all(parts: list[Lattice], budget: int) -> None:
    config = SearchConfig(tau=1.0)
    ranked = [best_first(prune(part, config), config, 99) for part in parts]
    every: dict[tuple[int, ...], float] = {}
    for tree, chances in ranked:
        for node, chance in enumerate(chances.tolist()):
            path = tuple(path_to(tree, node))
            every[path] = max(every.get(path, 0.0), chance)
    tree, chances = merge(ranked, budget)
    held = [tuple(path_to(tree, node)) for node in range(len(tree))]
    assert len(set(held)) == len(held) == min(budget, len(every))
    assert chances.tolist() == [every[path] for path in held] == sorted(every.values(), reverse=True)[: len(held)]


# One promise each


def lattice_of(*positions: dict[int, float], chain: bool = False) -> Lattice:
    """From the probabilities of the candidates of each position, the likeliest first."""
    m = max(map(len, positions))
    ids = [[*row, *[NO_TOKEN] * (m - len(row))] for row in positions]
    q = [[*row.values(), *[0.0] * (m - len(row))] for row in positions]
    with np.errstate(divide="ignore"):
        return Lattice(np.array(ids), np.log(np.array(q, np.float32)), chain)


def test_the_smallest_set_that_reaches_tau() -> None:
    lattice = lattice_of({5: 0.5, 6: 0.25, 8: 0.15, 9: 0.1}, {5: 0.9, 6: 0.05, 8: 0.05})
    assert prune(lattice, SearchConfig(tau=0.8)).ids.tolist() == [[5, 6, 8], [5, NO_TOKEN, NO_TOKEN]]
    assert prune(lattice, SearchConfig(tau=0.8, m_max=2)).ids.tolist() == [[5, 6], [5, NO_TOKEN]]
    assert prune(lattice, SearchConfig(tau=0.0)).ids.tolist() == [[5], [5]]


def test_eos_is_kept_and_ends_the_expansion() -> None:
    lattice = lattice_of({5: 0.9, 6: 0.05, 0: 0.03}, {0: 0.6, 5: 0.3}, {5: 1.0})
    pruned = prune(lattice, SearchConfig(), EOS)
    assert pruned.ids.tolist() == [[5, 0], [0, 5]]
    np.testing.assert_array_equal(np.exp(pruned.log_q[0]), np.exp(lattice.log_q[0, [0, 2]]))
    assert len(prune(lattice, SearchConfig())) == 3


def test_drafts_end_before_an_eos() -> None:
    lattice = lattice_of({5: 0.6, 0: 0.4}, {6: 0.7, 7: 0.3}, {0: 1.0})
    for config in (SearchConfig(tau=1.0, beam=9), SearchConfig(tau=1.0, expand="best_first", budget=99)):
        assert sorted(build_tree(lattice, config, None, EOS).tokens.tolist()) == [5, 6]
    assert build_tree(lattice, SearchConfig(), None, EOS, tree=False).tokens.tolist() == [5, 6]


def test_the_proxy_can_change_the_path_and_lam_weighs_it() -> None:
    class Likes(TrigramProxy):
        def __init__(self) -> None:
            super().__init__(0, tabled=True)
            self.log_p[:] = -8
            self.log_p[:, 6, 9] = -0.125

    lattice = lattice_of({5: 0.6, 6: 0.4}, {8: 0.6, 9: 0.4})

    def path(lam: float) -> list[int]:
        return build_tree(lattice, SearchConfig(tau=1.0, lam=lam), Likes(), tree=False).tokens.tolist()

    assert (path(1.0), path(0.5), path(0.0)) == ([5, 8], [6, 9], [6, 9])


@pytest.mark.parametrize("expand", ["beam", "best_first"])
def test_budgets_hold_and_no_tree_is_a_path(expand: str) -> None:
    rng = np.random.default_rng(0)
    q = -np.sort(-rng.dirichlet(np.full(6, 0.8), 10), axis=1)
    lattice = Lattice(np.tile(np.arange(1, 7), (10, 1)), np.log(q).astype(np.float32))
    for budget in (1, 5, 12):
        tree = build_tree(lattice, SearchConfig(expand=expand, budget=budget))
        assert len(tree) == budget
    path = build_tree(lattice, SearchConfig(expand=expand), tree=False)
    assert path.parents.tolist() == list(range(-1, 9))
    assert len(build_tree(lattice, SearchConfig(expand="best_first"))) == 10


def test_a_chain_is_its_first_candidates() -> None:
    lattice = lattice_of({5: 0.4, 6: 0.3}, {8: 0.9, 9: 0.1}, {2: 0.5, 0: 0.5}, {0: 0.9, 1: 0.1}, chain=True)
    contrary = TrigramProxy(1, tabled=True)
    assert build_tree(lattice, SearchConfig(tau=1.0), contrary, EOS).tokens.tolist() == [5, 8, 2]
    tree = build_tree(lattice, SearchConfig(tau=1.0, expand="best_first", budget=9), contrary, EOS)
    held = sorted(tuple(path_to(tree, node)) for node in range(len(tree)))
    assert held == [(5,), (5, 8), (5, 8, 2), (5, 8, 2, 1), (5, 9), (6,)]


@pytest.mark.parametrize("expand", ["beam", "best_first"])
def test_nothing_to_draft(expand: str) -> None:
    config = SearchConfig(expand=expand)
    for lattice in (
        Lattice.empty(),
        lattice_of({0: 1.0}),
        Lattice(np.full((3, 2), NO_TOKEN), np.full((3, 2), -np.inf, np.float32)),
    ):
        assert len(build_tree(lattice, config, TrigramProxy(0, tabled=True), EOS)) == 0
        assert len(build_tree(lattice, config, None, EOS, tree=False)) == 0
    assert len(sample_draft(Lattice.empty(), config, Dice()).tree) == 0


def test_sampled_paths_follow_the_pruned_distributions() -> None:
    lattice = lattice_of({5: 0.5, 6: 0.3, 8: 0.2}, {3: 0.9, 4: 0.1})
    draft = sample_draft(lattice, SearchConfig(tau=0.75, beam=4000), Dice())
    np.testing.assert_allclose(draft.q, [[0.625, 0.375], [1, 0]], rtol=1e-6)
    first = draft.tree.tokens[list(draft.attempts[0])]
    assert np.mean(first == 5) == pytest.approx(0.625, abs=0.04)
    assert set(first.tolist()) == {5, 6}
    assert len(sample_draft(lattice, SearchConfig(), Dice(), tree=False).tree) == 2


def test_sampled_paths_end_where_they_have_to() -> None:
    chain = lattice_of({5: 0.5, 6: 0.5}, {3: 0.5, 0: 0.5}, {4: 1.0}, chain=True)
    draft = sample_draft(chain, SearchConfig(tau=1.0, beam=64), Dice(), EOS)
    held = {tuple(path_to(draft.tree, node)) for node in range(len(draft.tree))}
    assert held == {(5,), (6,), (5, 3), (5, 0), (5, 3, 4)}


def test_log_probabilities_that_are_no_numbers_are_refused() -> None:
    lattice = Lattice(np.array([[1, 2]]), np.array([[-1, np.nan]], np.float32))
    with pytest.raises(ZerodraftError, match="NaN"):
        prune(lattice, SearchConfig())


@pytest.mark.parametrize(
    "setting", [{"tau": 1.5}, {"lam": -0.1}, {"m_max": 0}, {"beam": 0}, {"budget": 0}, {"expand": "wide"}]
)
def test_bad_settings_are_named(setting: dict) -> None:
    name, value = next(iter(setting.items()))
    config = SearchConfig()
    # past the checker of annotations, which users do not have
    object.__setattr__(config, name, value)
    with pytest.raises(ZerodraftError, match=f"{name}={value!r}"):
        config.__post_init__()


def test_the_published_defaults() -> None:
    config = SearchConfig()
    assert (config.tau, config.m_max, config.beam, config.lam) == (0.8, 15, 3, 0.5)
    assert isinstance(TrigramProxy(0, tabled=True), ProxySession)
