"""Two rows of known text, told to a drafter's session bit by bit, as decoding would."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from zerodraft.decoding.lattice import Lattice
from zerodraft.decoding.protocols import DraftSession, Progress

STEPS = ((6, 250), (1, 3), (4, 0), (290, 20))
"""Positions that become known at each step, of both rows: different numbers, and past the first size of a cache."""


def drafts(session: DraftSession, ids: Tensor, taps: Sequence[Tensor]) -> Iterator[tuple[int, int, Lattice]]:
    """Row, positions with known states (one more token is known), and the draft of up to 4 tokens made there."""
    known = [0, 0]
    for steps in STEPS:
        progress = []
        for row, step in enumerate(steps):
            first = known[row] + (known[row] > 0)
            known[row] += step
            tokens = ids[row, first : known[row] + 1] if step else ids[row, :0]
            progress.append(Progress(tokens, taps[row][0, known[row] - step : known[row]]))
        session.observe(progress)
        lengths = [4 if steps[0] else 0, 3 if steps[1] else 0]
        for row, lattice in enumerate(session.propose(lengths)):
            assert len(lattice) == lengths[row]
            if lengths[row]:
                yield row, known[row], lattice
