"""What path search costs on one core: against the lattice's positions, its candidates and the beam's width.

`wide` lattices keep all their candidates everywhere (the worst case), `typical` ones what the published tau = 0.8
leaves of a drafter that is sure of most positions. `no table` asks the proxy position by position, as proxies that
look back further than two tokens are asked. The proxy is a memory-mapped trigram table over a made-up language in which
many of the lattice's n-grams occur.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from zerodraft.bench.measure import Case
from zerodraft.bench.sections import Effort, Section, point
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.ngram import open_table, save_table
from zerodraft.decoding.ngram_build import build_table
from zerodraft.decoding.proxies import NgramProxy
from zerodraft.decoding.scorers import ProxySession
from zerodraft.decoding.search import SearchConfig, build_tree

VOCABULARY = 49_152
LATTICES = 8
"""Searched in turn, so that the processor's cache does not hold the answers."""
PUBLISHED = {"k": 30, "M": 15, "B": 3}
SWEEPS = {"k": (4, 8, 16, 30, 64), "M": (2, 4, 8, 15, 30), "B": (1, 2, 3, 5, 10)}
NAMES = {"k": "positions", "M": "candidates of a position", "B": "width of the beam"}


def search_sections(effort: Effort, seed: int) -> dict[str, Section]:
    """A section for each of k, M and B, the others as published."""
    rng = np.random.default_rng(seed)
    text = language(20_000 if effort.quick else 300_000, rng)
    sections = {}
    with trigrams(text) as session:
        for x, values in SWEEPS.items():
            points = []
            for value in effort.pick(values):
                at = PUBLISHED | {x: value}
                cases = cases_of(text, session, at["k"], at["M"], at["B"], rng)
                points.append(point(at, cases, effort.many))
            about = "Pruning, search and the draft tree: lattice in, tree out. Published: k = 30, M = 15, B = 3."
            sections[f"search_{x}"] = Section(
                title=f"Path search by {NAMES[x]}", about=about, x=x, x_label=f"{x}, {NAMES[x]}", points=points
            )
    return sections


def cases_of(
    text: Int64[np.ndarray, " n"], session: ProxySession, k: int, m: int, beam: int, rng: np.random.Generator
) -> dict[str, Case]:
    """The same lattices searched in several ways."""
    # flat enough that even tau = 0.8 would not do: tau = 1 keeps all
    wide = [lattice_of(text, k, m, 50.0, rng) for _ in range(LATTICES)]
    typical = [lattice_of(text, k, m, 0.15, rng) for _ in range(LATTICES)]
    everything = SearchConfig(tau=1.0, m_max=m, beam=beam)
    best_first = SearchConfig(tau=1.0, m_max=m, expand="best_first", budget=k)
    return {
        "wide, trigram": in_turn(wide, everything, session),
        "wide, no table": in_turn(wide, everything, WithoutTable(session)),
        "wide, no proxy": in_turn(wide, everything, None),
        "wide, best-first": in_turn(wide, best_first, session),
        "typical, trigram": in_turn(typical, SearchConfig(m_max=m, beam=beam), session),
    }


@contextmanager
def trigrams(text: Int64[np.ndarray, " n"]) -> Iterator[ProxySession]:
    """A proxy over a table of the text on disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proxy.ngram"
        save_table(build_table([text], VOCABULARY), path)
        session = NgramProxy(open_table(path)).start()
        session.observe(text[:64].tolist())
        yield session


def language(tokens: int, rng: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """Text in which every token has 20 successors, the first much likelier than the last."""
    successors = rng.integers(0, 4096, (4096, 20))
    choices = np.minimum(rng.zipf(1.5, tokens) - 1, 19)
    text = [0]
    for choice in choices.tolist():
        text.append(int(successors[text[-1], choice]))
    return np.array(text)


def lattice_of(
    text: Int64[np.ndarray, " n"], k: int, m: int, concentration: float, rng: np.random.Generator
) -> Lattice:
    """Around a stretch of the text: its own tokens and others that are frequent in it."""
    start = int(rng.integers(len(text) - k))
    ids = np.stack([rng.permutation(np.unique(np.append(rng.choice(text, 6 * m), t)))[:m] for t in text[start:][:k]])
    ids[:, 0] = text[start : start + k]
    for row in ids:  # the text's token may have been among the others
        repeat = np.flatnonzero(row[1:] == row[0])
        row[1 + repeat] = VOCABULARY - 1
    q = -np.sort(-rng.dirichlet(np.full(m, concentration), k), axis=1)
    return Lattice(ids, np.log(np.maximum(q, 1e-9)).astype(np.float32))


class WithoutTable:
    """The same proxy, asked position by position."""

    def __init__(self, session: Any) -> None:
        self.observe, self.root = session.observe, session.root
        self.score, self.advance = session.score, session.advance

    def table(self, ids: Int64[np.ndarray, "k m"]) -> None:
        """Has none."""


def in_turn(lattices: list[Lattice], config: SearchConfig, proxy: ProxySession | None) -> Case:
    """One search over the next of the lattices."""
    at = 0

    def search() -> None:
        nonlocal at
        at = (at + 1) % len(lattices)
        build_tree(lattices[at], config, proxy)

    return search
