"""Random cases of drafted against plain decoding: for a minute here, for as long as you like with a variable.

`ZERODRAFT_FUZZ_MINUTES=60 pytest tests/decoding/test_fuzzing.py -m fuzz` goes on for an hour, from the case
`ZERODRAFT_FUZZ_START` on. A failure prints the case; `run(draw(its number))` repeats it.
"""

import logging
import os
from collections import Counter
from itertools import count
from time import monotonic

import pytest

from tests.decoding.fuzzing import draw, run

logger = logging.getLogger(__name__)
MINUTES = os.environ.get("ZERODRAFT_FUZZ_MINUTES")
ODD_OPTIONS = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers warns of some that are drawn


def spend(seconds: float, start: int) -> Counter[str]:
    """Run cases until the time is up; all failures are told together. Returns how the others ended."""
    ends: Counter[str] = Counter()
    failures: list[str] = []
    until = monotonic() + seconds
    for number in count(start):
        if monotonic() > until or len(failures) > 20:
            break
        case = draw(number)
        try:
            ends[run(case).partition(":")[0]] += 1
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n{case}")
    assert not failures, f"{len(failures)} of {sum(ends.values()) + len(failures)} cases:\n" + "\n\n".join(failures)
    return ends


@ODD_OPTIONS
def test_random_cases_for_less_than_a_minute() -> None:
    ends = spend(50, 0)
    assert ends["same"] + ends["tied"] > 3 * ends["refused"]


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.skipif(MINUTES is None, reason="as long as ZERODRAFT_FUZZ_MINUTES says")
@ODD_OPTIONS
def test_random_cases_for_long() -> None:
    ends = spend(60 * float(MINUTES or 0), int(os.environ.get("ZERODRAFT_FUZZ_START", "1000000")))
    logger.info("%s", dict(ends))
