"""Several models trained as one: runs from scratch that differ in their seeds and learning rates alone.

A model of a few million parameters leaves most of a GPU idle. Here the weights of all runs are stacked and
`torch.func.vmap` maps the library's own model over them, so that every kernel does the work of all; on CUDA a compiled
step is one graph. Each run keeps its own weights, order of blocks, learning rates, gradient norm and loss, and comes
out as `pretrain` makes it, up to rounding.
"""

import hashlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import set_seed

from zerodraft.common.errors import ZerodraftError, writing
from zerodraft.common.outputs import new_file, write_json
from zerodraft.fast.graphed import CudaGraphs
from zerodraft.models.loading import default_device
from zerodraft.training.base import LossNotFinite
from zerodraft.training.callbacks import SECONDS_BETWEEN_LINES, JsonLog
from zerodraft.training.data import PackedBlocks, build_data, read_documents
from zerodraft.training.folder import RESULTS, claimed, differences, start_folder
from zerodraft.training.kept import new_model, with_origin
from zerodraft.training.optim import learning_rate_scale
from zerodraft.training.recipe import Recipe
from zerodraft.training.stacked_optim import StackedOptimizer
from zerodraft.training.strict import to_mapping
from zerodraft.training.ztt.losses import CycleLoss
from zerodraft.training.ztt.models import build_from_scratch, number_of_cycles
from zerodraft.training.ztt.run import check_data, evaluation_sets, tokenizer_of
from zerodraft.training.ztt.trainer import metrics_by_cycle

logger = logging.getLogger(__name__)

STATE = "stacked.pt"
"""Checkpoint of all runs, in the folder of the first."""

Parameters = dict[str, Tensor]
"""By name: `(runs, ...)`."""

MAY_DIFFER = ("output", "seed", "training.learning_rate", "training.muon_learning_rate", "training.ztt_learning_rate")


class StackedPaused(Exception):
    """The runs were stopped at a checkpoint."""


def pretrain_stacked(
    recipes: Sequence[Recipe],
    *,
    deadline: float = math.inf,
    turn: AbstractContextManager[Any] | None = None,
    tell: Callable[[str], None] = logger.info,
) -> list[dict[str, Any] | LossNotFinite]:
    """Trains several models from scratch at once; runs that were stopped go on from their last checkpoint.

    Args:
        recipes: One a run; they differ in nothing but `MAY_DIFFER`.
        deadline: In seconds of `time.monotonic`: at this time all are stopped at a checkpoint.
        turn: Entered for the training alone, after what the device need not wait for: reading, compiling, for all
            numbers of cycles. Processes that share a device take turns by it.
        tell: Takes a line about the progress.

    Returns:
        For each run what `pretrain` returns, or the error that stopped it alone.

    Raises:
        StackedPaused: the deadline has come.
        ZerodraftError: the recipes or the data do not fit, or a folder holds another run.
    """
    _check(recipes)
    begun = (Path(recipes[0].output) / STATE).exists()
    with ExitStack() as stack:
        for recipe in recipes:
            stack.enter_context(claimed(recipe.output, recipe, resume=begun))
        # under vmap no tensor says that it needs a gradient, and the other kernels then keep nothing for their backward
        stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]))
        stack.enter_context(warnings.catch_warnings())
        # vmap says of CPU attention that it runs once for each model: nothing that a user could change
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return _Runs(recipes).train(deadline, turn or nullcontext(), tell)


def _check(recipes: Sequence[Recipe]) -> None:
    if not recipes:
        raise ZerodraftError("there are no recipes to train: give at least one")
    first = recipes[0]
    for recipe in recipes:
        changed = [key for key in differences(to_mapping(first), to_mapping(recipe)) if key not in MAY_DIFFER]
        if changed:
            raise ZerodraftError(
                f"'{recipe.output}' differs from '{first.output}' in {', '.join(changed)}: runs trained as one may "
                f"differ in {', '.join(MAY_DIFFER)} alone"
            )
    if len({recipe.output for recipe in recipes}) < len(recipes):
        raise ZerodraftError("two runs have the same output: give each a folder of its own")
    training = first.training
    unfit = {
        "model.start": first.model.start is not None,
        "loss.kind": first.loss.kind == "sampled",
        "peft.rank": first.peft.rank > 0,
        "training.max_minutes": training.max_minutes > 0,
        "training.accumulation": training.accumulation > 1,
        "training.gradient_checkpointing": training.gradient_checkpointing,
        "training.fsdp": training.fsdp,
        "training.eval_every": training.eval_every > 0,
    }
    if refused := [key for key, used in unfit.items() if used]:
        raise ZerodraftError(f"{refused[0]} cannot be used by runs that are trained as one: train them one by one")


class _Runs:
    """The state of all runs, and the loop over their steps."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self.recipes, self.recipe = recipes, recipes[0]
        self.device = torch.device("cpu") if self.recipe.training.use_cpu else default_device()
        set_seed(self.recipe.seed)
        documents = read_documents(self.recipe.data.train, self.recipe.data)
        self.tokenizer = tokenizer_of(self.recipe, documents)
        data = build_data(self.recipe.data, self.tokenizer, documents)
        self.evaluations = evaluation_sets(data)
        if any(blocks.learned is not None for blocks in (data.train, *self.evaluations.values())):
            raise ZerodraftError(
                "data has messages or completions, of which only a part is learned: runs trained as one take plain "
                "text, so train these one by one"
            )
        models = []
        for recipe in recipes:
            set_seed(recipe.seed)
            models.append(build_from_scratch(recipe.model, self.tokenizer).train())
        check_data(models[0], data, self.recipe, self.recipe.training.batch_size)
        self.rows = data.train.rows().to(self.device, torch.int32)
        self.cycle_loss = CycleLoss(self.recipe.loss, number_of_cycles(models[0]), self.recipe.seed)
        stacked, _ = stack_module_state(models)
        self.parameters = {name: values.detach().to(self.device) for name, values in stacked.items()}
        self.optimizer = StackedOptimizer(models, self.parameters, [recipe.training for recipe in recipes])
        self.model = models[0].to(self.device)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                vars(module)["forward"] = partial(_flat_linear, module)
        self.step = 0
        self.losses = torch.zeros(self.recipe.training.steps, len(recipes), device=self.device)
        self.ids = self.rows.new_zeros(len(recipes), self.recipe.training.batch_size, self.recipe.data.context_length)
        self._steps: dict[tuple[tuple[str, Any], ...], Callable[[], Tensor]] = {}
        # steps that are not compiled ask for numbers on the way, which no graph can hold
        recorded = self.device.type == "cuda" and self.recipe.training.compile
        self._graphs = CudaGraphs(self.device) if recorded else None

    # -- training -------------------------------------------------------------------------------------------------

    def train(
        self, deadline: float, turn: AbstractContextManager[Any], tell: Callable[[str], None]
    ) -> list[dict[str, Any] | LossNotFinite]:
        """Makes all steps from the last checkpoint on, evaluates, and writes what each run leaves."""
        state = Path(self.recipe.output) / STATE
        resumed = self._load(state)
        logs = [start_folder(Path(recipe.output), recipe, resumed) for recipe in self.recipes]
        for step in range(resumed, self.recipe.training.steps):
            self._prepare(step)
        with turn:
            written, seconds = self._make_steps(resumed, deadline, tell, logs)
            evaluated = self._evaluate()
        self._write_losses(logs, written)
        tokens = self.recipe.training.batch_size * self.recipe.data.context_length
        common = {
            "steps": self.step,
            "tokens": self.step * tokens,
            "seconds": seconds,
            "tokens_per_second": (self.step - resumed) * tokens / seconds,
            "stacked": len(self.recipes),
        }
        finite = torch.isfinite(self.losses).T.tolist()
        results = []
        for index, (recipe, log) in enumerate(zip(self.recipes, logs, strict=True)):
            if not all(finite[index]):
                step = finite[index].index(False)
                results.append(LossNotFinite(f"the loss became {self.losses[step, index].item()} at step {step + 1}"))
                continue
            log.write(step=self.step, **evaluated[index])
            results.append(self._leave(index, recipe, {**common, "evaluation": evaluated[index]}))
        state.unlink(missing_ok=True)
        return results

    def _make_steps(
        self, resumed: int, deadline: float, tell: Callable[[str], None], logs: Sequence[JsonLog]
    ) -> tuple[int, float]:
        """All steps from the last checkpoint on; how many of them are in the logs, and the seconds they took."""
        training, written = self.recipe.training, resumed
        batches = islice(self._batches(), resumed, None)
        began, told = time.perf_counter(), time.monotonic()
        while self.step < training.steps:
            self.ids.copy_(self.rows[next(batches)])
            self.losses[self.step] = self._one_step()
            self.step += 1
            over = time.monotonic() >= deadline and self.step < training.steps
            if over or (training.save_every and self.step % training.save_every == 0):
                self._write_losses(logs, written)
                self._save(Path(self.recipe.output) / STATE)
                written = self.step
            if over:
                raise StackedPaused
            if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                mean = float(self.losses[self.step - 1].nanmean())
                tell(f"step {self.step} of {training.steps}, mean loss {mean:.4f}")
        self.losses.sum().item()  # waits for the device
        return written, time.perf_counter() - began

    def _batches(self) -> Iterator[Int[Tensor, "runs b"]]:
        """Indices of the blocks of each step, in the order in which the Trainer reads them."""
        size, count = self.recipe.training.batch_size, len(self.rows)
        epoch = 0
        while True:
            orders = torch.stack(
                [torch.randperm(count, generator=torch.Generator().manual_seed(r.seed + epoch)) for r in self.recipes]
            ).to(self.device)
            for start in range(0, count - size + 1, size):
                yield orders[:, start : start + size]
            epoch += 1

    def _one_step(self) -> Float[Tensor, " runs"]:
        self.optimizer.begin_step(learning_rate_scale(self.recipe.training, self.step))
        return self._prepare(self.step)()

    def _prepare(self, step: int) -> Callable[[], Tensor]:
        """What makes a step: steps that run the same cycles share it."""
        progress = step / self.recipe.training.steps
        arguments = self.cycle_loss.forward_arguments(step, 0, self.ids.shape[1:], progress=progress)
        key = tuple(arguments.items())
        if key not in self._steps:
            self._steps[key] = self._prepared(arguments)
        return self._steps[key]

    def _prepared(self, arguments: dict[str, Any]) -> Callable[[], Tensor]:
        """The step with these arguments of the forward pass, compiled and recorded as the recipe and device allow."""
        training = self.recipe.training
        forward = vmap(lambda weights, ids: self._loss(weights, ids, arguments).loss)
        if training.compile:
            forward = torch.compile(forward, fullgraph=True)

        def step() -> Tensor:
            leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=training.bf16):
                found = forward(leaves, self.ids.long())
            self.optimizer.step(torch.autograd.grad(found.sum(), list(leaves.values()), allow_unused=True))
            return found.detach()

        if self._graphs is None:
            return step
        # recording runs the step a few times: what it changed is put back
        state = [*self.parameters.values(), *self.optimizer.state()]
        before = [value.clone() for value in state]
        recorded = self._graphs(step)
        for value, kept in zip(state, before, strict=True):
            value.copy_(kept)
        return recorded

    def _loss(self, parameters: Parameters, ids: Int[Tensor, "b t"], arguments: dict[str, Any]) -> Any:
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False, **arguments}
        return functional_call(self.model, parameters, (), inputs)

    @torch.no_grad()
    def _evaluate(self) -> list[dict[str, float]]:
        """For every run the metrics of `ZttTrainer.evaluate`."""
        metrics: list[dict[str, float]] = [{} for _ in self.recipes]
        self.model.eval()
        for name, blocks in self.evaluations.items():
            for index, losses in enumerate(self._losses_by_cycle(blocks).tolist()):
                metrics[index] |= metrics_by_cycle(losses, blocks, f"eval_{name}")
        self.model.train()
        return metrics

    def _losses_by_cycle(self, blocks: PackedBlocks) -> Float[Tensor, "runs cycles"]:
        cycles = self.cycle_loss.cycles
        arguments = {"cycle_weights": (1.0,) * cycles} if cycles > 1 else {}

        def losses(parameters: Parameters, ids: Tensor) -> Tensor:
            found = self._loss(parameters, ids, arguments)
            return found.cycle_losses if cycles > 1 else found.loss[None]

        sums = torch.zeros(len(self.recipes), cycles, dtype=torch.float64, device=self.device)
        for rows in blocks.rows().split(self.recipe.training.batch_size):
            found = vmap(losses, in_dims=(0, None))(self.parameters, rows.to(self.device))
            sums += found.double() * len(rows)
        return sums.cpu() / len(blocks)

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _write_losses(self, logs: Sequence[JsonLog], since: int) -> None:
        scales = [learning_rate_scale(self.recipe.training, step) for step in range(since, self.step)]
        for recipe, log, losses in zip(self.recipes, logs, self.losses[since : self.step].T.tolist(), strict=True):
            for number, (loss, scale) in enumerate(zip(losses, scales, strict=True), since + 1):
                log.write(step=number, learning_rate=recipe.training.learning_rate * scale, loss=loss)

    def _save(self, path: Path) -> None:
        state = {
            "step": self.step, "losses": self.losses, "parameters": self.parameters,
            "optimizer": self.optimizer.state(), "runs": self._fingerprint(),
        }  # fmt: skip
        with writing(f"The checkpoint '{path}'"), new_file(path) as partial:
            torch.save(state, partial)

    def _load(self, path: Path) -> int:
        """Takes over a checkpoint, if there is one; the number of steps that it has made."""
        if not path.exists():
            return 0
        advice = "remove the runs' folders to begin anew"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            fits = state["runs"] == self._fingerprint()
        except Exception as error:  # whatever a damaged file makes the unpickler raise
            raise ZerodraftError(f"The checkpoint '{path}' cannot be read: {advice}.") from error
        if not fits:
            raise ZerodraftError(f"The checkpoint '{path}' is that of other runs: give the same recipes, or {advice}.")
        self.step = state["step"]
        mine = [self.losses, *self.parameters.values(), *self.optimizer.state()]
        saved = [state["losses"], *state["parameters"].values(), *state["optimizer"]]
        for value, kept in zip(mine, saved, strict=True):
            value.copy_(kept)
        return self.step

    def _fingerprint(self) -> str:
        recipes = [to_mapping(replace(recipe, output="")) for recipe in self.recipes]
        return hashlib.sha256(repr(recipes).encode()).hexdigest()

    def _leave(self, index: int, recipe: Recipe, results: dict[str, Any]) -> dict[str, Any]:
        """Writes one run's model and results, as `pretrain` does."""
        folder = Path(recipe.output)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.parameters[name][index])
        self.model.config.use_cache = True
        with new_model(folder) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
        results = with_origin({"parameters": self.model.num_parameters(), **results}, recipe)
        write_json(folder / RESULTS, results)
        return results


def _flat_linear(module: nn.Linear, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
    """A linear layer over all tokens in one row: over several dimensions vmap would copy the weights for each of the
    first, as they are not the same in all runs."""
    return functional.linear(x.flatten(0, -2), module.weight, module.bias).unflatten(0, x.shape[:-1])
