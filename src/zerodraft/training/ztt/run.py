"""`pretrain` and `finetune`: a recipe in, a trained model with its log and results out (see `folder`)."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, default_data_collator, set_seed

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.common.outputs import filled_once
from zerodraft.models.resolve import resolve
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.base import training_arguments
from zerodraft.training.callbacks import ProgressBar
from zerodraft.training.data import PackedBlocks, TextData, build_data, cache_folder, read_documents, split_documents
from zerodraft.training.folder import checkpoint_step, claimed, start_folder
from zerodraft.training.kept import leave
from zerodraft.training.recipe import Recipe
from zerodraft.training.rows import Document, plain_text
from zerodraft.training.tokenizer import train_tokenizer
from zerodraft.training.ztt.adapters import add_adapters, trained_parts
from zerodraft.training.ztt.losses import CycleLoss
from zerodraft.training.ztt.models import build_from_scratch, build_from_start, number_of_cycles
from zerodraft.training.ztt.trainer import ZttTrainer


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
    with claimed(recipe.output, recipe, resume) as checkpoint:
        return _train(recipe, Path(recipe.output), checkpoint, callbacks)


def _train(
    recipe: Recipe, folder: Path, checkpoint: str | None, callbacks: Sequence[TrainerCallback] | None
) -> dict[str, Any]:
    set_seed(recipe.seed)
    documents = read_documents(recipe.data.train, recipe.data)
    tokenizer = tokenizer_of(recipe, documents)
    data = build_data(recipe.data, tokenizer, documents)
    # the weights may not depend on how the tokenizer came about
    set_seed(recipe.seed)
    scratch = recipe.model.start is None
    model = build_from_scratch(recipe.model, tokenizer) if scratch else build_from_start(recipe.model)
    cycle_loss = CycleLoss(recipe.loss, number_of_cycles(model), recipe.seed)
    parameters = model.num_parameters()
    if recipe.peft.rank:
        model = add_adapters(model, recipe.peft)

    resumed_step = checkpoint_step(checkpoint)
    arguments = training_arguments(recipe.training, str(folder), recipe.seed, **_environment(recipe, model))
    batch = recipe.training.batch_size * arguments.world_size
    check_data(model, data, recipe, batch)
    log = start_folder(folder, recipe, resumed_step) if arguments.process_index == 0 else None
    tokens = batch * recipe.data.context_length
    trainer = ZttTrainer(
        recipe=recipe.training,
        cycle_loss=cycle_loss,
        log=log,
        evaluations=evaluation_sets(data),
        model=model,
        args=arguments,
        train_dataset=data.train,
        # the Trainer wants one to evaluate during training; `evaluate` is ours and takes `evaluations`
        eval_dataset=data.validation,
        # blocks have no padding, and a mask of ones would only cost the fused causal attention
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[ProgressBar(tokens * recipe.training.accumulation)] if callbacks is None else list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.write_losses()
    trained = trained_parts(trainer.model)  # type: ignore[arg-type]  # the Trainer always has one
    steps = trainer.state.global_step
    seen, new = trainer.passes_before(steps), trainer.passes_before(steps) - trainer.passes_before(resumed_step)
    results = {
        "parameters": parameters,
        "trained_parameters": sum(trained.values()),
        "trained": trained,
        "steps": steps,
        "tokens": seen * tokens,
        "seconds": seconds,
        "tokens_per_second": new * tokens / seconds,
        "resumed_from": checkpoint and Path(checkpoint).name,
        "evaluation": trainer.evaluate(),
    }
    return leave(trainer, folder, recipe, results, tokenizer, adapters=bool(recipe.peft.rank))


def tokenizer_of(recipe: Recipe, documents: Sequence[Document]) -> Any:
    """The tokenizer of a run: the one that it names, its start's own, or one made of its training text."""
    if path := recipe.tokenizer.path or recipe.model.start:
        folder = user_path(path)
        # a folder that is named for it may hold a tokenizer alone, which is no model
        return load_tokenizer(folder if recipe.tokenizer.path and folder.is_dir() else resolve(path))
    train, _ = split_documents(documents, 0.0 if recipe.data.validation else recipe.data.validation_fraction)
    texts = [plain_text(document) for document in train or documents]
    # training is deterministic, so equal text and size may share the result
    digest = hashlib.sha256(f"{recipe.tokenizer.vocab_size}:{recipe.model.max_position_embeddings}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    cached = cache_folder(recipe.data) / f"tokenizer-{digest.hexdigest()[:32]}"

    def train_one(partial: Path) -> None:
        sizes = recipe.tokenizer.vocab_size, recipe.model.max_position_embeddings
        train_tokenizer(texts, *sizes).save_pretrained(partial)

    return load_tokenizer(filled_once(cached, train_one))


def check_data(model: Any, data: TextData, recipe: Recipe, batch: int) -> None:
    """Raises `ZerodraftError` unless the model knows all tokens and there is a batch of blocks to train on."""
    # by the tokens that there are: some tokenizers have a few more than their model has rows
    size = model.get_input_embeddings().weight.shape[0]
    largest = max(int(blocks.tokens.max()) for blocks in (data.train, *evaluation_sets(data).values()))
    if largest >= size:
        raise ZerodraftError(
            f"the data holds token {largest}, the model's vocabulary has {size}: "
            f"use the model's own tokenizer (tokenizer.path is '{recipe.tokenizer.path}')"
        )
    if len(data.train) < batch:
        raise ZerodraftError(
            f"data.train makes {len(data.train)} blocks of {recipe.data.context_length} tokens, a batch takes {batch}: "
            "give more text, or lower data.context_length or training.batch_size"
        )


def evaluation_sets(data: TextData) -> dict[str, PackedBlocks]:
    """What a run is evaluated on, by name."""
    validation = {} if data.validation is None else {"validation": data.validation}
    return {**validation, **data.evaluation}


def _environment(recipe: Recipe, model: Any) -> dict[str, Any]:
    """Arguments that depend on how the processes were started."""
    arguments: dict[str, Any] = {}
    if recipe.training.fsdp:
        if "WORLD_SIZE" not in os.environ:
            raise ZerodraftError("training.fsdp needs several processes: start with `accelerate launch` or `torchrun`")
        if recipe.training.optimizer == "muon":
            raise ZerodraftError("training.optimizer 'muon' needs whole matrices: use 'adamw' with training.fsdp")
        layer = type(model.get_decoder().layers[0]).__name__
        arguments["fsdp"] = True
        arguments["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": [layer]}
    return arguments
