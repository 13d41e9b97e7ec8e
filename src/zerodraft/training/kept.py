"""What a training run leaves: the model, and what is needed to repeat it."""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import zerodraft
from zerodraft.common.errors import reading
from zerodraft.training.base import RecipeTrainer
from zerodraft.training.strict import to_mapping


def provenance(recipe: Any) -> dict[str, Any]:
    """What is needed to repeat a run: command, seed, versions, machine and recipe."""
    return {
        "command": _command(),
        "seed": recipe.seed,
        "versions": versions(),
        "machine": {"platform": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "recipe": to_mapping(recipe),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "zerodraft": zerodraft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def save_model(trainer: RecipeTrainer, folder: Path, tokenizer: Any = None, *, adapters: bool = False) -> None:
    """Writes `model/` beside its place and renames it; `adapters` are kept apart and merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # the Trainer switches the cache off in the config; whoever loads the model will want to generate
    model.config.use_cache = True
    partial, final = folder / ".model", folder / "model"
    shutil.rmtree(partial, ignore_errors=True) if trainer.args.should_save else None
    trainer.accelerator.wait_for_everyone()
    with reading(f"The model in '{folder}'", "could not be written"):
        if adapters:
            trainer.save_model(str(partial / "adapter"))
            if trainer.args.should_save:
                (partial / "adapter" / "training_args.bin").unlink()
                model.merge_and_unload().save_pretrained(partial)
        else:
            trainer.save_model(str(partial))
        if trainer.args.should_save and tokenizer is not None:
            tokenizer.save_pretrained(partial)
    if trainer.args.should_save:
        # a pickle of the Trainer's arguments, which nothing of ours reads
        (partial / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)


def _command() -> str:
    name = Path(sys.argv[0]).name
    return " ".join(["zerodraft" if name == "__main__.py" else name, *sys.argv[1:]])
