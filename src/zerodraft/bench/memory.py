"""How much memory decoding takes: resident, and at its peak, of a process that does nothing else.

A process that has decoded in one way keeps what another way did not need, so each method has a process of its own. All
of them load target and drafter, plain decoding too: what a method's peak is above that of plain decoding is its own.
"""

import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from zerodraft.bench.methods import BASE, FULL, Equipment, available, choose
from zerodraft.common.errors import ZerodraftError

STATUS = Path("/proc/self/status")
MIB = 2**20
PROMPT_TOKENS = 512
"""Of the text that is continued, if the prompts are that long."""


def resident() -> float | None:
    """MiB of this process in memory now; None where the system does not tell."""
    return _status("VmRSS")


def peak() -> float:
    """The most MiB of this process that ever were in memory, or since `forget_peak`."""
    # not the other one where there is a choice: it starts with what the parent had
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (MIB if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Let `peak` start anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def measure_here(
    equipment: Equipment, name: str, inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one text by the method `name` in this process, which has loaded the equipment: MiB after loading, peaks of
    loading, of decoding (with what the method prepares), after it, and the peak of all."""
    found = {"loaded": resident(), "load_peak": peak()}
    apart = forget_peak()
    method = choose([name], available(equipment))[name]
    written = method.decode(inputs, options)
    found |= {"decode_peak": peak() if apart else None, "after": resident()}
    found["peak"] = max(found["load_peak"], peak())
    counts = {"prompt_tokens": inputs["input_ids"].shape[1], "new_tokens": len(written.tokens[0])}
    return {"about": method.about, **counts, "mib": found}


def measure_apart(of: Callable[[str], dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`measure_here` for each method in a process of its own, and what it takes compared with plain decoding.

    Args:
        of: Loads the equipment and measures the method of this name; has to be picklable.
        names: The methods; without any the one that the commands use. Plain decoding is always measured.

    Raises:
        ZerodraftError: a process was killed.
    """
    found = {}
    for name in dict.fromkeys([BASE, *(names or [FULL])]):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                found[name] = pool.submit(of, name).result()
            except BrokenProcessPool as error:
                raise ZerodraftError(f"The process that measured {name} was killed: is there enough memory?") from error
    base = found[BASE]["mib"]
    for values in found.values():
        mib = values["mib"]
        values["ratio"] = mib["peak"] / base["peak"]
        values["decode_ratio"] = mib["decode_peak"] / base["decode_peak"] if mib["decode_peak"] else None
    return found


def _status(key: str) -> float | None:
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text(encoding="utf-8").split("\n"):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None
