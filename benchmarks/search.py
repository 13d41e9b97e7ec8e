"""What path search costs: a lattice of 30 positions with 15 candidates each, beam 3, trigram proxy, one core.

`wide` lattices keep all 15 candidates everywhere (the worst case), `typical` ones what the published tau = 0.8 leaves
of a drafter that is sure of most positions. `no table` asks the proxy position by position, as proxies that look back
further than two tokens are asked. The proxy is a memory-mapped table over a made-up language in which many of the
lattice's n-grams occur.

python benchmarks/search.py --threads 1 --output results/search.json
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from harness import Case, arguments, emit, interleave, spread
from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.ngram import open_table, save_table
from zerodraft.decoding.ngram_build import build_table
from zerodraft.decoding.proxies import NgramProxy
from zerodraft.decoding.scorers import ProxySession
from zerodraft.decoding.search import SearchConfig, build_tree, prune

VOCABULARY = 49_152
GOAL_MS = 0.5
LATTICES = 8
"""Searched in turn, so that the processor's cache does not hold the answers."""


def language(tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Text in which every token has 20 successors, the first much likelier than the last."""
    successors = rng.integers(0, 4096, (4096, 20))
    choices = np.minimum(rng.zipf(1.5, tokens) - 1, 19)
    text = [0]
    for choice in choices.tolist():
        text.append(int(successors[text[-1], choice]))
    return np.array(text)


def lattice_of(text: np.ndarray, k: int, m: int, concentration: float, rng: np.random.Generator) -> Lattice:
    """Around a stretch of the text: its own tokens and others that are frequent in it."""
    start = int(rng.integers(len(text) - k))
    ids = np.stack([rng.permutation(np.unique(np.append(rng.choice(text, 4 * m), t)))[:m] for t in text[start:][:k]])
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

    def table(self, ids: np.ndarray) -> None:
        return None


def in_turn(lattices: list[Lattice], config: SearchConfig, proxy: ProxySession | None) -> Case:
    """One search over the next of the lattices."""
    at = 0

    def search() -> None:
        nonlocal at
        at = (at + 1) % len(lattices)
        build_tree(lattices[at], config, proxy)

    return search


def main() -> None:
    options = arguments(__doc__ or "", positions=30, candidates=15, tokens=300_000, repeats=300)
    rng = np.random.default_rng(options.seed)
    text = language(options.tokens, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proxy.ngram"
        save_table(build_table([text], VOCABULARY), path)
        session = NgramProxy(open_table(path)).start()
        session.observe(text[:64].tolist())
        k, m = options.positions, options.candidates
        # flat enough that even tau = 0.8 would not do: tau = 1 keeps all
        lattices = {
            "wide": ([lattice_of(text, k, m, 50.0, rng) for _ in range(LATTICES)], 1.0),
            "typical": ([lattice_of(text, k, m, 0.15, rng) for _ in range(LATTICES)], 0.8),
        }
        cases: dict[str, Case] = {}
        for name, (some, tau) in lattices.items():
            config = SearchConfig(tau=tau)
            cases[f"{name}, trigram"] = in_turn(some, config, session)
            cases[f"{name}, no table"] = in_turn(some, config, WithoutTable(session))
            cases[f"{name}, no proxy"] = in_turn(some, config, None)
            best_first = SearchConfig(tau=tau, expand="best_first", budget=k)
            cases[f"{name}, best-first"] = in_turn(some, best_first, session)
        seconds = interleave(cases, repeats=options.repeats, warmup=2 * LATTICES)
        kept = {
            name: float(np.mean([(prune(x, SearchConfig(tau=tau)).ids >= 0).sum(1).mean() for x in some]))
            for name, (some, tau) in lattices.items()
        }
    milliseconds = {name: spread([1e3 * s for s in values]) for name, values in seconds.items()}
    emit(
        {
            "benchmark": "search",
            "positions": k,
            "candidates": m,
            "beam": SearchConfig().beam,
            "kept_candidates": kept,
            "milliseconds": milliseconds,
            "goal_ms": GOAL_MS,
            "reached": milliseconds["wide, trigram"]["median"] <= GOAL_MS,
        },
        options,
    )


if __name__ == "__main__":
    main()
