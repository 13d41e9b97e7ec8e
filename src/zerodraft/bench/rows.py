"""What a run keeps on disk, so that an interrupted one goes on: a line of JSON for each finished prompt."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import json_object
from zerodraft.common.outputs import write_whole


class RowFile:
    """Finished prompts, behind a first line with the settings that they were measured with.

    Args:
        path: The file; None keeps nothing.
        settings: What has to be the same for rows to belong together, in JSON types.

    Raises:
        ZerodraftError: the file is of a run with other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        if path is None:
            return
        settings = json.loads(json.dumps(settings))
        if not path.is_file():
            write_whole(path, json.dumps({"settings": settings}) + "\n")
            return
        lines = _whole_lines(path)
        found = lines[0].get("settings") if lines else None
        if not isinstance(found, dict):
            raise ZerodraftError(f"'{path}' holds no rows of this command: remove it, or name another --output.")
        for name in sorted({*found, *settings}):
            if found.get(name) != settings.get(name):
                raise ZerodraftError(
                    f"'{path}' was begun with {name}={found.get(name)}, this run has {settings.get(name)}: use the "
                    "same settings, remove the file, or name another --output."
                )
        self.rows = lines[1:]
        _drop_cut_line(path)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished prompt."""
        self.rows.append(row)
        if self.path is not None:
            _append(self.path, row)

    def remove(self) -> None:
        """The run is finished and its result written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class References:
    """Tokens of plain greedy decoding by the prompt's name, in a file that grows: `{"id", "of", "tokens"}` a line, the
    last of a name counting. `of` is made of the target's hash and the prompt's tokens, so that references of another
    target or text are told apart; lines without it are believed. `batched` are the names of those that were decoded
    together with others.

    Args:
        path: The file; None keeps nothing.
        target: The hash of the target's weights, and what it computes in.
    """

    def __init__(self, path: Path | None, target: str = "") -> None:
        self.path, self.target = path, target
        rows = _whole_lines(path) if path is not None and path.is_file() else []
        try:
            self.tokens = {str(row["id"]): [int(token) for token in row["tokens"]] for row in rows}
            self.of = {str(row["id"]): row["of"] for row in rows if "of" in row}
            self.batched = {str(row["id"]) for row in rows} - {str(row["id"]) for row in rows if "batched" not in row}
        except (KeyError, TypeError, ValueError) as error:
            raise ZerodraftError(f"'{path}' holds no references: every line needs an id and tokens.") from error

    def get(self, name: str, prompt: Sequence[int], length: int, ends: frozenset[int]) -> list[int] | None:
        """The first `length` tokens, or None where they have to be decoded.

        Raises:
            ZerodraftError: fewer are known, and the text did not end there; or they are of another target or text.
        """
        tokens = self.tokens.get(name)
        if self.of.get(name, self._of(prompt)) != self._of(prompt):
            raise ZerodraftError(
                f"'{self.path}' has tokens for prompt '{name}' that belong to another target or another text: name "
                "another --references."
            )
        if tokens is None or len(tokens) >= length or (tokens and tokens[-1] in ends):
            return None if tokens is None else tokens[:length]
        raise ZerodraftError(
            f"'{self.path}' has {len(tokens)} tokens for prompt '{name}', which does not end there: lower "
            f"--max-new-tokens from {length}, or name another --references."
        )

    def add(self, name: str, prompt: Sequence[int], tokens: list[int], *, batched: bool = False) -> None:
        """Keep newly decoded tokens."""
        self.tokens[name], self.of[name] = tokens, self._of(prompt)
        (self.batched.add if batched else self.batched.discard)(name)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                _drop_cut_line(self.path)
            row = {"id": name, "of": self.of[name], "tokens": tokens}
            _append(self.path, row | ({"batched": True} if batched else {}))

    def _of(self, prompt: Sequence[int]) -> str:
        return hashlib.sha256(f"{self.target} {list(prompt)}".encode()).hexdigest()[:16]


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _drop_cut_line(path: Path) -> None:
    """What was cut off at the end would spoil the next line."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        write_whole(path, text[: text.rfind("\n") + 1])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """All lines but one that was cut off."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json_object(line, f"'{path}' line {number}") for number, line in enumerate(lines, 1) if line.strip()]
