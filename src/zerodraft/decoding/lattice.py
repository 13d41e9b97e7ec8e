"""What a drafter hands to the engine: candidates for each of the next k positions, side by side.

A drafter that fills all positions in one pass gives one distribution per position, each blind to what the others chose.
Together they form a lattice (DiffuSpec, arXiv 2510.02358); which path through it to verify is the search's business.
Lattices live on the CPU as numpy arrays: they are small, and the search over them is scalar work.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from zerodraft.common.errors import ZerodraftError

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Lattice:
    """Candidates per drafted position, the likeliest first.

    **Fields:** `ids` holds token ids of the target's vocabulary, `log_q` the drafter's log-probabilities (natural
    logarithm, over its whole vocabulary, so a row need not sum to one). Rows with fewer candidates are padded at the
    end with `NO_TOKEN` and minus infinity. k may be 0: nothing to draft.

    `chain` says that each row was computed given the first candidate of the row before (an autoregressive drafter, a
    prompt lookup), so that only the first candidates form a path and the others are alternatives to its next token.
    `pairs[i, b, c]` is the drafter's log-probability of candidate c of position i after candidate b of position i - 1,
    for drafters that know it (position 0 says the same for all b). `log_q` then serves to choose candidates, `pairs` to
    score paths.

    `beside` holds another lattice for the same positions, from a drafter that joins several: their paths go into one
    draft.

    `drawn` says that these first candidates were drawn at random, from the candidates' renormalised mass `exp(log_q)`.
    """

    ids: Int64[np.ndarray, "k m"]
    log_q: Float32[np.ndarray, "k m"]
    chain: bool = False
    drawn: bool = False
    pairs: Float32[np.ndarray, "k m m"] | None = None
    beside: "Lattice | None" = None

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_q.shape or self.ids.ndim != 2:
            raise ZerodraftError(
                f"A lattice has candidates of shape {self.ids.shape} but log-probabilities of shape "
                f"{self.log_q.shape}; give two arrays of the same shape (positions, candidates)."
            )

        if self.pairs is not None and self.pairs.shape != (*self.ids.shape, self.ids.shape[1]):
            raise ZerodraftError(
                f"A lattice of {self.ids.shape} candidates has pairs of shape {self.pairs.shape}; give one score for "
                "each candidate after each candidate of the position before."
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def parts(self) -> "list[Lattice]":
        """This lattice and those beside it."""
        return [self, *(self.beside.parts() if self.beside else ())]

    @staticmethod
    def empty() -> "Lattice":
        """The lattice of a drafter that has nothing to propose."""
        return Lattice(np.empty((0, 1), np.int64), np.empty((0, 1), np.float32))
