"""What drafters are called."""

import re
from pathlib import Path

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.models.cache import default_cache_dir
from zerodraft.models.resolve import SHORT_NAMES

SHIPPED = {"smollm2": "smollm2-drafter"}
"""What a drafter in the repository's `models` directory is called, by the short name of its target."""


def check_name(name: str) -> None:
    """Raise `ZerodraftError` for a `lookup:N` or `self:C` that is none."""
    start, colon, number = name.partition(":")
    numbers = {"lookup": "the longest match in tokens", "self": "the number of cycles that draft"}
    if start in numbers and colon and not re.fullmatch("0*[1-9][0-9]{0,8}", number):
        raise ZerodraftError(f"The drafter is '{name}'; after '{start}:' comes {numbers[start]}, such as {start}:3")


def shipped_drafter(target: str) -> Path | None:
    """The repository's drafter for a target, if the working directory or this checkout has one."""
    short = next((short for short in SHIPPED if _is_called(short, target)), None)
    if short is None:
        return None
    roots = (Path.cwd(), Path(__file__).resolve().parents[3])
    found = (root / "models" / SHIPPED[short] for root in roots)
    return next((path for path in found if (path / "config.json").is_file()), None)


def _is_called(short: str, name: str) -> bool:
    """Whether a name is this short name, its hub id, or the directory that it resolves to."""
    if name in (short, SHORT_NAMES[short].hub_id):
        return True
    if not name:
        # a model that was never loaded from anywhere
        return False
    try:
        directory = default_cache_dir() / short
    except ZerodraftError:  # then nothing has been resolved to it
        return False
    return user_path(name).resolve() == directory.resolve()
