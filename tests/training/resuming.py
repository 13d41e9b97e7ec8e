"""What a training run of any drafter has to show: its loss falls, resumed it ends where it would have ended, and one
process at a time trains in a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.lock import locked
from zerodraft.training.callbacks import read_log


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in read_log(folder / "log.jsonl") if "loss" in row]


def learns_and_resumes(
    train: Callable[..., dict[str, Any]], recipe: Callable[[Path], Any], load: Callable[[Path], Any], work: Path
) -> tuple[dict[str, Any], Any]:
    """Trains for 20 steps and again from the 10th; both end with the same model. Returns the first run's results and
    the model.

    `recipe` makes the recipe of a run in a folder, `load` reads the model that one left; `again` in `work` has the
    checkpoints.
    """
    whole = train(recipe(work / "whole"), callbacks=[])
    assert whole["steps"] == 20
    before = losses(work / "whole")
    assert np.mean(before[-6:]) < np.mean(before[:6])

    again = work / "again"
    (work / "whole").rename(again)
    for name in ("checkpoint-20", "model"):
        (again / name).rename(work / name)
    (again / "results.json").unlink()
    resumed = train(recipe(again), resume=True, callbacks=[])
    assert resumed["resumed_from"] == "checkpoint-10"
    assert losses(again) == before
    assert resumed["held_back"] == whole["held_back"]
    # killed before its results, a run makes no further step
    (again / "results.json").unlink()
    ended = train(recipe(again), resume=True, callbacks=[])
    assert (ended["resumed_from"], ended["steps"], ended["blocks"]) == ("checkpoint-20", 20, whole["blocks"])
    assert losses(again) == before
    assert ended["held_back"] == whole["held_back"]
    with locked(again, "taken"), pytest.raises(ZerodraftError, match="Another process is training in"):
        train(recipe(again), resume=True, callbacks=[])
    first, second = load(work / "model"), load(again / "model")
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    return whole, second
