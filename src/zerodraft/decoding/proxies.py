"""Causal proxies: small models that say which candidates of a lattice go together.

The path search (DiffuSpec, arXiv 2510.02358) weighs the drafter's scores with those of a causal model that is cheap
enough to ask for every candidate after every path. Each one here follows the protocol `scorers.CausalProxy`:
`NgramProxy` reads a table made beforehand, `ContextProxy` learns from the prompt and the output as they come,
`KenLMProxy` asks a KenLM model, `MixtureProxy` joins several. What a proxy says decides which paths are verified and so
how many tokens are accepted; whether they are right is the target's to say.

Every session gives natural logarithms, finite and at most 0. States are opaque and hashable.
"""

import math
from collections.abc import Hashable, Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.decoding.lattice import NO_TOKEN
from zerodraft.decoding.ngram import NgramTable, open_table
from zerodraft.decoding.scorers import CausalProxy, LatticeScores, ProxySession

LN_10 = math.log(10)
LARGEST_VOCABULARY = 1 << 19
"""Token ids that are looked for among a KenLM model's words."""

Tokens = tuple[int, ...]


class NgramProxy:
    """A token n-gram table (`zerodraft ngram build`), shared by all sessions.

    Args:
        table: A table, or where it is.
        vocab_size: The target's; a table of another vocabulary is an error.
    """

    def __init__(self, table: NgramTable | str | PathLike[str], *, vocab_size: int | None = None) -> None:
        self.table = table if isinstance(table, NgramTable) else open_table(table)
        if vocab_size is not None and vocab_size != self.table.vocab_size:
            name = "The n-gram table" if isinstance(table, NgramTable) else f"The n-gram table '{fspath(table)}'"
            raise ZerodraftError(
                f"{name} was built for a vocabulary of {self.table.vocab_size} tokens, the target has {vocab_size}: "
                "build one for this target with 'zerodraft ngram build'."
            )

    def start(self) -> "NgramSession":
        """A session for one row."""
        return NgramSession(self.table)


class NgramSession:
    """The last tokens of one row; a state is the last order - 1 tokens, `NO_TOKEN` where there were none yet."""

    def __init__(self, table: NgramTable) -> None:
        self.model = table
        self.last: Tokens = (NO_TOKEN,) * (table.order - 1)

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of known tokens."""
        self.last = _tail((*self.last, *map(int, tokens)), len(self.last))

    def root(self) -> Tokens:
        """The state after all known tokens."""
        return self.last

    def score(self, states: Sequence[Tokens], candidates: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "b m"]:
        """log p(candidate | state)."""
        return self.model.score(np.array(states, np.int64).reshape(len(states), -1), candidates)

    def advance(self, state: Tokens, token: int) -> Tokens:
        """The state one token further."""
        return _tail((*state, token), len(state))

    def table(self, ids: Int64[np.ndarray, "k m"]) -> LatticeScores | None:
        """All scores of a lattice at once; None if the table is of order 4 or more."""
        return self.model.lattice(np.array(self.last, np.int64), ids)


class ContextProxy:
    """The n-grams of the prompt and the output so far: no files, and good where a text repeats itself.

    Smoothed after Witten and Bell (1991; PPM's method C): after a context that `total` tokens followed, `types` of them
    different, one that followed it `count` times has probability `(count + types * p_shorter) / (total + types)`, where
    `p_shorter` is that after the context without its first token, and one over the vocabulary in the end.

    Args:
        vocab_size: The target's.
        order: The n of the longest n-grams.
    """

    def __init__(self, vocab_size: int, *, order: int = 4) -> None:
        if vocab_size < 1 or order < 1:
            raise ZerodraftError(
                f"A context proxy has vocab_size={vocab_size} and order={order}; give at least 1 for both."
            )
        self.vocab_size, self.order = vocab_size, order

    def start(self) -> "ContextSession":
        """A session for one row."""
        return ContextSession(self.vocab_size, self.order)


class ContextSession:
    """What followed each context of 0 to order - 1 tokens; a state is the last order - 1 tokens."""

    def __init__(self, vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.last: Tokens = ()
        self.followers: dict[Tokens, dict[int, int]] = {}
        self.totals: dict[Tokens, int] = {}

    def observe(self, tokens: Sequence[int]) -> None:
        """Count known tokens."""
        for token in map(int, tokens):
            for start in range(len(self.last) + 1):
                context = self.last[start:]
                counts = self.followers.setdefault(context, {})
                counts[token] = counts.get(token, 0) + 1
                self.totals[context] = self.totals.get(context, 0) + 1
            self.last = self.advance(self.last, token)

    def root(self) -> Tokens:
        """The state after all known tokens."""
        return self.last

    def score(self, states: Sequence[Tokens], candidates: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "b m"]:
        """log p(candidate | state)."""
        tokens = candidates.tolist()
        # plain Python: most contexts were never seen, and then there is nothing to compute
        shortest = self._interpolated((), tokens, [1 / self.vocab_size] * len(tokens))
        rows = []
        for state in states:
            p = shortest
            for length in range(1, len(state) + 1):
                context = state[-length:]
                if context not in self.totals:
                    break
                p = self._interpolated(context, tokens, p)
            rows.append(p)
        return np.log(np.array(rows, np.float64).reshape(len(states), len(tokens))).astype(np.float32)

    def _interpolated(self, context: Tokens, tokens: list[int], p_shorter: list[float]) -> list[float]:
        counts = self.followers.get(context)
        if not counts:
            return p_shorter
        share = 1 / (self.totals[context] + len(counts))
        back = len(counts) * share
        return [counts.get(token, 0) * share + back * p for token, p in zip(tokens, p_shorter, strict=True)]

    def advance(self, state: Tokens, token: int) -> Tokens:
        """The state one token further."""
        return _tail((*state, token), self.order - 1)

    def table(self, ids: Int64[np.ndarray, "k m"]) -> LatticeScores | None:
        """Not done here: looking up the few contexts that are asked for is cheaper."""
        return None


class KenLMProxy:
    """A KenLM model (ARPA or binary) whose words are token ids in decimal, such as `lmplz` makes from the output of
    `zerodraft ngram words`. Needs the `kenlm` extra.

    Args:
        path: The model's file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            import kenlm  # pyright: ignore[reportMissingImports]  # an extra that takes a compiler
        except ImportError as error:
            raise ZerodraftError("KenLM files need the kenlm extra: pip install 'zerodraft[kenlm]'.") from error
        file = user_path(path)
        if not file.is_file():
            raise ZerodraftError(f"There is no KenLM file at '{path}'.")
        config = kenlm.Config()
        config.show_progress = False
        config.arpa_complain = kenlm.ARPALoadComplain.NONE
        try:
            self.model: Any = kenlm.Model(str(file), config)
        except (OSError, RuntimeError) as error:
            raise ZerodraftError(f"'{path}' cannot be read as a KenLM model: give an ARPA or binary file.") from error
        self.new_state = kenlm.State
        if not any(str(token) in self.model for token in range(LARGEST_VOCABULARY)):
            raise ZerodraftError(
                f"The words of the KenLM model '{path}' are not token ids: make its text with 'zerodraft ngram words'."
            )

    def start(self) -> "KenLMSession":
        """A session for one row."""
        return KenLMSession(self.model, self.new_state)


class KenLMSession:
    """A state is the last order - 1 tokens; KenLM's own states are kept beside."""

    def __init__(self, model: Any, new_state: Any) -> None:
        self.model, self.new_state = model, new_state
        self.last: Tokens = ()
        self.known: dict[Tokens, Any] = {}

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of known tokens."""
        self.last = _tail((*self.last, *map(int, tokens)), self.model.order - 1)
        self.known.clear()

    def root(self) -> Tokens:
        """The state after all known tokens."""
        return self.last

    def score(self, states: Sequence[Tokens], candidates: Int64[np.ndarray, " m"]) -> Float32[np.ndarray, "b m"]:
        """log p(candidate | state)."""
        words, after, score = list(map(str, candidates.tolist())), self.new_state(), self.model.BaseScore
        rows = [[score(state, word, after) for word in words] for state in map(self._state, states)]
        return np.array(rows, np.float32).reshape(len(states), len(words)) * np.float32(LN_10)

    def _state(self, tokens: Tokens) -> Any:
        """KenLM's state after these tokens, from no context: a prompt is not the beginning of a sentence."""
        if tokens not in self.known:
            state, after = self.new_state(), self.new_state()
            self.model.NullContextWrite(state)
            for token in tokens:
                self.model.BaseScore(state, str(token), after)
                state, after = after, state
            self.known[tokens] = state
        return self.known[tokens]

    def advance(self, state: Tokens, token: int) -> Tokens:
        """The state one token further."""
        return _tail((*state, token), self.model.order - 1)

    def table(self, ids: Int64[np.ndarray, "k m"]) -> LatticeScores | None:
        """KenLM is asked word by word."""
        return None


class MixtureProxy:
    """The weighted mean of several proxies' probabilities: a proxy that knows a place well is heard there.

    Args:
        proxies: What to mix.
        weights: One for each, positive; their sum is made one. Equal by default.
    """

    def __init__(self, proxies: Sequence[CausalProxy], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(proxies) if weights is None else list(weights)
        if not proxies or len(weights) != len(proxies) or not all(0 < weight < math.inf for weight in weights):
            raise ZerodraftError(
                f"A mixture of {len(proxies)} proxies has weights {weights}; give at least one proxy, and a positive "
                "weight for each."
            )
        self.proxies = list(proxies)
        self.log_weights = [math.log(weight / sum(weights)) for weight in weights]

    def start(self) -> "MixtureSession":
        """A session for one row."""
        return MixtureSession([proxy.start() for proxy in self.proxies], self.log_weights)


class MixtureSession:
    """A state is the tuple of the parts' states."""

    def __init__(self, sessions: list[ProxySession], log_weights: list[float]) -> None:
        self.sessions, self.log_weights = sessions, [np.float32(w) for w in log_weights]

    def observe(self, tokens: Sequence[int]) -> None:
        """Take note of known tokens."""
        for session in self.sessions:
            session.observe(tokens)

    def root(self) -> tuple[Hashable, ...]:
        """The state after all known tokens."""
        return tuple(session.root() for session in self.sessions)

    def score(
        self, states: Sequence[tuple[Hashable, ...]], candidates: Int64[np.ndarray, " m"]
    ) -> Float32[np.ndarray, "b m"]:
        """log of the mixed probability."""
        parts = zip(self.sessions, zip(*states, strict=True), strict=True)
        return self._mixed([session.score(own, candidates) for session, own in parts])

    def _mixed(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        weighted = [score + weight for score, weight in zip(scores, self.log_weights, strict=True)]
        # rounding may lift a sure candidate above probability one
        return np.minimum(np.logaddexp.reduce(weighted, axis=0), np.float32(0))

    def advance(self, state: tuple[Hashable, ...], token: int) -> tuple[Hashable, ...]:
        """The state one token further."""
        return tuple(session.advance(own, token) for session, own in zip(self.sessions, state, strict=True))

    def table(self, ids: Int64[np.ndarray, "k m"]) -> LatticeScores | None:
        """All scores of a lattice at once, if all parts can."""
        parts = []
        for session in self.sessions:
            part = session.table(ids)
            if part is None:
                return None
            parts.append(part)
        pairs = self._mixed([part.pairs for part in parts])
        return LatticeScores(pairs, self._mixed([p.pairs[:, None] + p.extra for p in parts]) - pairs[:, None])


def _tail(tokens: Tokens, n: int) -> Tokens:
    """The last n tokens, or as many as there are."""
    return tokens[max(0, len(tokens) - n) :]
