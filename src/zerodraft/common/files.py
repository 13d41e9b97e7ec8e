"""Text and JSON files that a user hands over: read whole and as text, or one sentence that says what they are instead.

Half a surrogate pair (a JSON string that was cut inside an emoji, a byte of a command line that is no UTF-8) is no
character: where text is meant it becomes U+FFFD, as a decoder with `errors="replace"` would have made it.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError, why

LARGEST_JSON = 1 << 28
"""Bytes of a JSON file that describes something; the largest tokenizers have a tenth of that."""

SURROGATES = re.compile("[\ud800-\udfff]")
KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` replaced.

    Raises:
        ZerodraftError: there is no such user, or nobody's home is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ZerodraftError(
            f"The home directory in '{os.fspath(path)}' is not known: write the path without '~'."
        ) from error


def check_regular(path: Path, what: str = "file") -> None:
    """Raises unless there is a regular file: opening a pipe waits for its other end, a device may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ZerodraftError(f"The {what} '{path}' cannot be read: {why(error)}.") from error
    if not stat.S_ISREG(mode):
        found = next((name for is_kind, name in KINDS if is_kind(mode)), "a device")
        raise ZerodraftError(f"The {what} '{path}' is {found}; expected a file.")


def read_text(path: Path, what: str = "file", *, pipes: bool = False) -> str:
    """The text of a file in UTF-8, without a byte order mark, with `\\n` at the ends of lines.

    Args:
        path: The file.
        what: What it is called in messages.
        pipes: A pipe or a terminal will do too: it is read to its end.

    Raises:
        ZerodraftError: nothing there, no file, or no UTF-8.
    """
    if not (pipes and path.exists() and not path.is_dir()):
        check_regular(path, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZerodraftError(f"The {what} '{path}' is not UTF-8 text: convert it first.") from error
    except (OSError, MemoryError) as error:
        raise ZerodraftError(f"The {what} '{path}' cannot be read: {why(error)}.") from error


def read_json(path: Path, what: str = "file") -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ZerodraftError: nothing there, no file, no JSON, no object, or far too large.
    """
    check_regular(path, what)
    if path.stat().st_size > LARGEST_JSON:
        raise ZerodraftError(f"The {what} '{path}' has {path.stat().st_size:,} bytes, too many for a description.")
    return json_object(read_text(path, what), f"The {what} '{path}'")


def model_type(path: Path) -> str:
    """What the `config.json` of a model directory says that it is."""
    kind = read_json(path / "config.json", "configuration").get("model_type")
    if not isinstance(kind, str):
        raise ZerodraftError(f"'{path / 'config.json'}' is not a model configuration: it has no model_type")
    return kind


def json_object(text: str, what: str) -> dict[str, Any]:
    """The object that a JSON text is; `what` begins the sentence if it is none."""
    try:
        value = json.loads(text)
        value = whole_characters(value) if "\\ud" in text.lower() else value
    # numbers of more digits than Python reads are a ValueError too
    except (ValueError, RecursionError) as error:
        raise ZerodraftError(f"{what} is not JSON: {why(error)}.") from error
    if not isinstance(value, dict):
        raise ZerodraftError(f"{what} must be an object with fields, got {type(value).__name__}.")
    return value


def whole_characters(value: Any) -> Any:
    """A text, or all texts in a JSON value, with U+FFFD for each half of a surrogate pair that lacks the other half."""
    if isinstance(value, str):
        return value if SURROGATES.search(value) is None else _joined(value)
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {whole_characters(key): whole_characters(item) for key, item in value.items()}
    return value


def _joined(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
