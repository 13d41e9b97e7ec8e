"""A run's folder: one process writes it at a time, and what is in it says whether and from where a run can go on.

It holds `recipe.json`, `log.jsonl`, `checkpoint-N/`, and at the end `model/` and `results.json`.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.common.lock import LOCK, locked
from zerodraft.common.outputs import remove_partials, write_json
from zerodraft.models.cache import sha256_of
from zerodraft.training.callbacks import JsonLog
from zerodraft.training.strict import from_mapping, to_mapping

logger = logging.getLogger(__name__)

RECIPE, RESULTS = "recipe.json", "results.json"
SUMS = "sums.json"
"""Beside the files of a checkpoint: the sha256 of each."""

WITHOUT_EFFECT = ("log_every", "eval_every", "save_every", "keep_checkpoints", "tensorboard", "report_to")
"""Fields of `training` that change no result of a run."""

MAY_CHANGE = ("steps", "max_minutes", "decay_fraction", *WITHOUT_EFFECT)
"""Fields of `training` that a resumed run may have other values of."""

PLACES = ("output", "out", "cache")
"""Where a run lives may change too."""


@contextmanager
def claimed(name: str, recipe: Any, resume: bool) -> Iterator[str | None]:
    """Holds the folder `name` for a run; gives the checkpoint to go on from, if any. Of several processes the first
    holds it for all.

    Raises:
        ZerodraftError: another process trains there, `check_folder` refuses, or the checkpoint is damaged.
    """
    folder = Path(name)
    if not name.strip() or folder.resolve() == Path(folder.resolve().anchor):
        raise ZerodraftError(f"'{name}' cannot be the folder of a run: name a new one, such as runs/first")
    begun = (folder / LOCK).exists() or (folder / RECIPE).exists()
    if os.environ.get("RANK", "0") != "0":
        yield check_folder(folder, recipe, resume, begun)
        return
    with locked(folder, f"Another process is training in '{folder}': wait for its end, or choose another output."):
        checkpoint = check_folder(folder, recipe, resume, begun)
        if checkpoint:
            check_sums(Path(checkpoint))
        yield checkpoint


def check_folder(folder: Path, recipe: Any, resume: bool, begun: bool) -> str | None:
    """The checkpoint to resume from; raises if the folder's state, `recipe` and `resume` do not fit together. `begun`:
    whether a run has been there."""
    checkpoint, finished = last_checkpoint(folder), (folder / RESULTS).exists()
    if not resume:
        if checkpoint or finished:
            raise ZerodraftError(f"'{folder}' already holds a run: choose another output, or continue it with --resume")
        if not begun and folder.is_dir() and {path.name for path in folder.iterdir()} - {LOCK}:
            raise ZerodraftError(f"'{folder}' holds other files: choose a new folder for the run")
        return None
    if checkpoint is None:
        if finished or not begun:
            raise ZerodraftError(
                f"nothing to resume: '{folder}' has no checkpoint (set training.save_every to write some)"
            )
        logger.info("'%s' has no checkpoint yet: the run starts from its beginning.", folder)
        return None
    try:
        old = from_mapping(type(recipe), read_json(folder / RECIPE, "recipe"))
    except ZerodraftError as error:
        raise ZerodraftError(f"'{folder / RECIPE}' cannot be read, so the run cannot be resumed: {error}") from error
    changed = differences(to_mapping(old), to_mapping(recipe))
    changed = [key for key in changed if key not in {*PLACES, *(f"training.{name}" for name in MAY_CHANGE)}]
    if changed:
        raise ZerodraftError(f"'{folder}' holds a run with another {', '.join(changed)}: a resumed run must keep it")
    return checkpoint


def write_sums(checkpoint: Path) -> None:
    """Notes the checksums of a checkpoint's files: pickles and states tell little about themselves, and a wrong number
    in one of them would show steps later, or never."""
    files = [path for path in checkpoint.rglob("*") if not path.is_dir()]
    sums = {path.relative_to(checkpoint).as_posix(): sha256_of(path) for path in files}
    # as it is: the checkpoint gets its name as a whole
    (checkpoint / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def check_sums(checkpoint: Path) -> None:
    """Raises `ZerodraftError` unless a checkpoint's files are those that were written."""
    advice = "remove the folder, and the run goes on from an earlier one or from its beginning"
    if not (checkpoint / SUMS).exists():
        raise ZerodraftError(
            f"The checkpoint '{checkpoint}' is incomplete, or of an older version: it has no {SUMS}: {advice}."
        )
    sums = read_json(checkpoint / SUMS, "list of checksums")
    for name, noted in sums.items():
        path = checkpoint / name
        if not path.is_file() or sha256_of(path) != noted:
            state = "damaged" if path.is_file() else "no file"
            raise ZerodraftError(f"'{name}' in the checkpoint '{checkpoint}' is {state}: {advice}.")


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Path of the newest complete checkpoint in a run's folder."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None


def checkpoint_step(checkpoint: str | None) -> int:
    """Optimizer steps that were made before a checkpoint; 0 without one."""
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


def start_folder(folder: Path, recipe: Any, resumed_step: int) -> JsonLog:
    """Notes the recipe in a run's folder and opens its log."""
    remove_partials(folder)
    write_json(folder / RECIPE, to_mapping(recipe))
    # what a killed run had begun to remove
    rotate_checkpoints(str(folder), save_total_limit=recipe.training.keep_checkpoints)
    return JsonLog(folder, resumed_step)


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Dotted keys of what differs between two mappings."""
    keys = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differences(a, b, f"{where}{key}.")
        elif a != b:
            keys.append(f"{where}{key}")
    return keys
