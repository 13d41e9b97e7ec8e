"""A line of a JSONL file as a mapping, or one clear sentence about what it is instead."""

from pathlib import Path
from typing import Any

from zerodraft.common.files import json_object


def json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    """The object on line `number` (from 1) of `path`.

    Raises:
        ZerodraftError: not JSON, or not an object.
    """
    return json_object(line, f"'{path}' line {number}")
