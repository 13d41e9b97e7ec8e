"""What a training run leaves: the model, and its results with what is needed to repeat it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zerodraft.common.errors import writing
from zerodraft.common.outputs import write_json
from zerodraft.common.provenance import provenance
from zerodraft.training.base import RecipeTrainer
from zerodraft.training.folder import RESULTS
from zerodraft.training.strict import to_mapping


def leave(
    trainer: RecipeTrainer,
    folder: Path,
    recipe: Any,
    results: dict[str, Any],
    tokenizer: Any = None,
    *,
    adapters: bool = False,
) -> dict[str, Any]:
    """Writes the model, then the results, by which a run counts as finished; returns these and their origin."""
    save_model(trainer, folder, tokenizer, adapters=adapters)
    results = with_origin(results, recipe)
    if trainer.is_world_process_zero():
        write_json(folder / RESULTS, results)
    return results


def with_origin(results: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """Results of a run with what is needed to make them again."""
    return {**results, **provenance(), "seed": recipe.seed, "recipe": to_mapping(recipe)}


@contextmanager
def new_model(folder: Path, first: bool = True) -> Iterator[Path]:
    """A place to write `model/` of a run's folder to, which then takes the place of what was there; of several
    processes the `first` one sees to that."""
    partial, final = folder / ".model", folder / "model"
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    with writing(f"The model in '{folder}'"):
        yield partial
        if first:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)


def save_model(trainer: RecipeTrainer, folder: Path, tokenizer: Any = None, *, adapters: bool = False) -> None:
    """Writes `model/` beside its place and renames it; `adapters` are kept apart and merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # the Trainer switches the cache off in the config; whoever loads the model will want to generate
    model.config.use_cache = True
    first = trainer.args.should_save
    with new_model(folder, first) as partial:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(partial / "adapter" if adapters else partial))
        if not first:
            return
        # a pickle of the Trainer's arguments, which nothing of ours reads
        (partial / "adapter" / "training_args.bin" if adapters else partial / "training_args.bin").unlink(
            missing_ok=True
        )
        if adapters:
            model.merge_and_unload().save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
