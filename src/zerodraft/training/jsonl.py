"""A line of a JSONL file as a mapping, or one clear sentence about what it is instead."""

import json
from pathlib import Path
from typing import Any

from zerodraft.errors import ZerodraftError


def json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    """The object on line `number` (from 1) of `path`.

    Raises:
        ZerodraftError: not JSON, or not an object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ZerodraftError(f"'{path}' line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ZerodraftError(f"'{path}' line {number} must be an object with fields, got {type(row).__name__}")
    return row
