"""Results from files, and figures into files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zerodraft.bench.report import plots_of
from zerodraft.bench.tables import KINDS, complete
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json, user_path
from zerodraft.common.outputs import write_whole


def read_results(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results by the names of their files, in the order of the names: shells differ in that.

    Args:
        files: Of `zerodraft bench`, `--output`; at least one of them. Of the others only their commands are reported.

    Raises:
        ZerodraftError: a file that cannot be read or is no such result, or two files with one name.
    """
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        path = user_path(file)
        result = read_json(path, "result")
        if path.stem in results:
            raise ZerodraftError(f"Two results are called '{path.stem}': give them different names.")
        results[path.stem] = result
    if not any(result.get("benchmark") in KINDS for result in results.values()):
        raise ZerodraftError(
            f"'{files[0]}' is not a result of 'zerodraft bench decode', 'memory' or 'kernels': name what they wrote."
        )
    return dict(sorted(results.items()))


def write_plots(results: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Path]]:
    """All figures as PNG; their files by result and title."""
    written: dict[str, dict[str, Path]] = {}
    for name, result in results.items():
        if result.get("benchmark") not in KINDS:
            continue
        with complete(name):
            images = plots_of(result)
        for title, image in images.items():
            path = folder / f"{name}-{re.sub('[^a-z0-9]+', '-', title.lower())}.png"
            write_whole(path, image)
            written.setdefault(name, {})[title] = path
    return written
