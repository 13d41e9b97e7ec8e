"""`pretrain` and `finetune`: a recipe in, a trained model with its log and results out.

A run's folder holds `recipe.json`, `log.jsonl` (every step), `checkpoint-N/`, and at the end `model/` and
`results.json`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, default_data_collator, set_seed

import zerodraft
from zerodraft.errors import ZerodraftError
from zerodraft.targets.resolve import resolve
from zerodraft.training.adapters import add_adapters
from zerodraft.training.base import RecipeTrainer, last_checkpoint, training_arguments
from zerodraft.training.callbacks import JsonLog, ProgressBar
from zerodraft.training.data import TextData, build_data, read_documents, split_documents
from zerodraft.training.losses import CycleLoss
from zerodraft.training.models import build_from_scratch, build_from_start, number_of_cycles
from zerodraft.training.recipe import Recipe
from zerodraft.training.strict import from_mapping, to_mapping
from zerodraft.training.tokenizer import load_tokenizer, train_tokenizer
from zerodraft.training.trainer import ZttTrainer

MAY_CHANGE = (
    "steps",
    "max_minutes",
    "decay_fraction",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
)
"""Fields of `training` that a resumed run may have other values of."""

PLACES = ("output", "out", "cache")
"""Where a run lives may change too."""


def pretrain(
    recipe: Recipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] | None = None
) -> dict[str, Any]:
    """Trains from scratch, tokenizer included.

    Args:
        recipe: the whole run.
        resume: continue from the last checkpoint in `recipe.output`.
        callbacks: instead of the progress bar.

    Returns:
        What is written to `results.json`: losses, speed, parameters, and what is needed to repeat the run.

    Raises:
        ZerodraftError: the recipe or the data does not fit, the folder holds another run, or the loss is not finite.
    """
    if recipe.model.start is not None:
        raise ZerodraftError(f"model.start is '{recipe.model.start}': to train an existing model use finetune")
    return _run(recipe, resume, callbacks)


def finetune(
    recipe: Recipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] | None = None
) -> dict[str, Any]:
    """Trains an existing model further, a plain one converted first; arguments, result and errors as in `pretrain`."""
    if recipe.model.start is None:
        raise ZerodraftError("finetune needs model.start: a folder, a hub id or a short name such as smollm2")
    return _run(recipe, resume, callbacks)


def _run(recipe: Recipe, resume: bool, callbacks: Sequence[TrainerCallback] | None) -> dict[str, Any]:
    folder = Path(recipe.output)
    checkpoint = check_folder(folder, recipe, resume)
    set_seed(recipe.seed)
    documents = read_documents(recipe.data.train, recipe.data)
    tokenizer = _tokenizer(recipe, documents)
    data = build_data(recipe.data, tokenizer, documents)
    # the weights may not depend on how the tokenizer came about
    set_seed(recipe.seed)
    scratch = recipe.model.start is None
    model = build_from_scratch(recipe.model, tokenizer) if scratch else build_from_start(recipe.model)
    _check_vocabulary(model, tokenizer, recipe)
    cycle_loss = CycleLoss(recipe.loss, number_of_cycles(model), recipe.seed)
    parameters = model.num_parameters()
    if recipe.peft.rank:
        model = add_adapters(model, recipe.peft)

    resumed_step = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    arguments = training_arguments(recipe.training, str(folder), recipe.seed, **_environment(recipe, model))
    log = start_folder(folder, recipe, resumed_step) if arguments.process_index == 0 else None
    tokens = (
        recipe.training.batch_size * recipe.training.accumulation * arguments.world_size * recipe.data.context_length
    )
    trainer = ZttTrainer(
        recipe=recipe.training,
        cycle_loss=cycle_loss,
        log=log,
        evaluations=_evaluations(data),
        model=model,
        args=arguments,
        train_dataset=data.train,
        # the Trainer wants one to evaluate during training; `evaluate` is ours and takes `evaluations`
        eval_dataset=data.validation,
        # blocks have no padding, and a mask of ones would only cost the fused causal attention
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[ProgressBar(tokens)] if callbacks is None else list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.write_losses()
    trained: Any = trainer.model
    steps = trainer.state.global_step
    results = {
        "parameters": parameters,
        "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "steps": steps,
        "tokens": steps * tokens,
        "seconds": seconds,
        "tokens_per_second": (steps - resumed_step) * tokens / seconds,
        "resumed_from": checkpoint and Path(checkpoint).name,
        "evaluation": trainer.evaluate(),
        **provenance(recipe),
    }
    save_model(trainer, folder, tokenizer, adapters=bool(recipe.peft.rank))
    if trainer.is_world_process_zero():
        write_json(folder / "results.json", results)
    return results


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


def check_folder(folder: Path, recipe: Any, resume: bool) -> str | None:
    """The checkpoint to resume from; raises if the folder's state, `recipe` and `resume` do not fit together."""
    checkpoint = last_checkpoint(folder)
    if not resume:
        if checkpoint or (folder / "results.json").exists():
            raise ZerodraftError(f"'{folder}' already holds a run: choose another output, or continue it with --resume")
        return None
    if checkpoint is None:
        raise ZerodraftError(f"nothing to resume: '{folder}' has no checkpoint (set training.save_every to write some)")
    old = from_mapping(type(recipe), json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    changed = _differences(to_mapping(old), to_mapping(recipe))
    changed = [key for key in changed if key not in {*PLACES, *(f"training.{name}" for name in MAY_CHANGE)}]
    if changed:
        raise ZerodraftError(f"'{folder}' holds a run with another {', '.join(changed)}: a resumed run must keep it")
    return checkpoint


def start_folder(folder: Path, recipe: Any, resumed_step: int) -> JsonLog:
    """Notes the recipe in a run's folder and opens its log."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", to_mapping(recipe))
    return JsonLog(folder, resumed_step)


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    keys = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += _differences(a, b, f"{where}{key}.")
        elif a != b:
            keys.append(f"{where}{key}")
    return keys


def _tokenizer(recipe: Recipe, documents: Sequence[str]) -> Any:
    path = recipe.tokenizer.path or (recipe.model.start and resolve(recipe.model.start))
    if path:
        return load_tokenizer(path)
    train, _ = split_documents(documents, 0.0 if recipe.data.validation else recipe.data.validation_fraction)
    # training is deterministic, so equal text and size may share the result
    digest = hashlib.sha256(f"{recipe.tokenizer.vocab_size}:{recipe.model.max_position_embeddings}".encode())
    for text in train:
        digest.update(hashlib.sha256(text.encode()).digest())
    cached = Path(recipe.data.cache).expanduser() / f"tokenizer-{digest.hexdigest()[:32]}"
    if not cached.is_dir():
        tokenizer = train_tokenizer(train, recipe.tokenizer.vocab_size, recipe.model.max_position_embeddings)
        partial = cached.with_name(f".partial-{os.getpid()}-{cached.name}")
        tokenizer.save_pretrained(partial)
        try:
            os.replace(partial, cached)
        except OSError:
            # another process finished the same tokenizer first
            shutil.rmtree(partial, ignore_errors=True)
    return load_tokenizer(cached)


def _check_vocabulary(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise ZerodraftError(
            f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary {size}: "
            f"use the model's own tokenizer (tokenizer.path is '{recipe.tokenizer.path}')"
        )


def _evaluations(data: TextData) -> dict[str, Any]:
    validation = {} if data.validation is None else {"validation": data.validation}
    return {**validation, **data.evaluation}


def _environment(recipe: Recipe, model: Any) -> dict[str, Any]:
    """Arguments that depend on what is installed and how the processes were started."""
    has_tensorboard = recipe.training.tensorboard and importlib.util.find_spec("tensorboard") is not None
    arguments: dict[str, Any] = {"report_to": ["tensorboard"] if has_tensorboard else []}
    if recipe.training.fsdp:
        if "WORLD_SIZE" not in os.environ:
            raise ZerodraftError("training.fsdp needs several processes: start with `accelerate launch` or `torchrun`")
        if recipe.training.optimizer == "muon":
            raise ZerodraftError("training.optimizer 'muon' needs whole matrices: use 'adamw' with training.fsdp")
        layer = type(model.get_decoder().layers[0]).__name__
        arguments["fsdp"] = True
        arguments["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": [layer]}
    return arguments


def save_model(trainer: RecipeTrainer, folder: Path, tokenizer: Any = None, *, adapters: bool = False) -> None:
    """Writes `model/` beside its place and renames it; `adapters` are kept apart and merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # the Trainer switches the cache off in the config; whoever loads the model will want to generate
    model.config.use_cache = True
    partial, final = folder / ".model", folder / "model"
    shutil.rmtree(partial, ignore_errors=True) if trainer.args.should_save else None
    trainer.accelerator.wait_for_everyone()
    if adapters:
        trainer.save_model(str(partial / "adapter"))
        if trainer.args.should_save:
            (partial / "adapter" / "training_args.bin").unlink()
            model.merge_and_unload().save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if trainer.args.should_save:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        # a pickle of the Trainer's arguments, which nothing of ours reads
        (partial / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)


def write_json(path: Path, value: Any) -> None:
    """Writes beside the place, then renames."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _command() -> str:
    name = Path(sys.argv[0]).name
    return " ".join(["zerodraft" if name == "__main__.py" else name, *sys.argv[1:]])
