"""Finished runs of the evidence, for what looks into their models: where they lie, and the text they are held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from evidence_plan import Run
from zerodraft import ZttForCausalLM
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.models.loading import load_pretrained
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.data import PackedBlocks, TextData, build_data, read_documents
from zerodraft.training.folder import RESULTS
from zerodraft.training.recipe import Recipe
from zerodraft.training.strict import from_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A run that is over."""

    folder: Path
    run: Run
    recipe: Recipe

    def model(self, **changes: Any) -> ZttForCausalLM:
        """The trained model; `changes` are other values for its configuration.

        Raises:
            ZerodraftError: it is none that has cycles.
        """
        if self.recipe.model.kind != "ztt":
            raise ZerodraftError(f"{self.run} trained a plain model: only arms of kind ztt can be looked into")
        model = load_pretrained(ZttForCausalLM, self.folder / "model", dtype=torch.float32, **changes)
        assert isinstance(model, ZttForCausalLM)
        return model.eval()

    def tokenizer(self) -> Any:
        """That of the model."""
        return load_tokenizer(self.folder / "model")

    def data(self) -> TextData:
        """The text that it was trained on, and that it was not."""
        data = self.recipe.data
        return build_data(data, self.tokenizer(), read_documents(data.train, data))


def finished_runs(folder: Path) -> list[FinishedRun]:
    """All finished runs in the folder of a table, `ARM/RATE/SEED` below it.

    Raises:
        ZerodraftError: there is none.
    """
    found = [path.parent for path in sorted(folder.glob(f"*/*/*/{RESULTS}")) if (path.parent / "model").is_dir()]
    if not found:
        raise ZerodraftError(f"no finished run in '{folder}': expected ARM/RATE/SEED/{RESULTS} with a model beside it")
    return [_finished_run(path) for path in found]


def _finished_run(folder: Path) -> FinishedRun:
    recipe = from_mapping(Recipe, read_json(folder / RESULTS, "result").get("recipe"))
    arm, rate, seed = folder.parts[-3:]
    if seed != str(recipe.seed):
        raise ZerodraftError(f"'{folder}' holds a run with seed {recipe.seed}: its folder must be called so")
    return FinishedRun(folder=folder, run=Run(arm, rate, recipe.seed), recipe=recipe)


def rows_of(blocks: PackedBlocks, limit: int) -> Int[Tensor, "rows t"]:
    """The tokens of at most `limit` blocks (0: of all), taken evenly from the whole text."""
    step = max(1, len(blocks) // limit) if limit else 1
    chosen = range(0, len(blocks), step)[: limit or None]
    return torch.stack([blocks[index]["input_ids"] for index in chosen])


def best_rate(losses: Sequence[tuple[Run, float]], arm: str) -> str:
    """The rate that most seeds of an arm were run with, and of several such the one with the lowest mean loss."""
    rates: dict[str, list[float]] = {}
    for run, loss in losses:
        if run.arm == arm:
            rates.setdefault(run.rate, []).append(loss)
    return min(rates, key=lambda rate: (-len(rates[rate]), sum(rates[rate]) / len(rates[rate])))
