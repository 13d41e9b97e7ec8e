"""Making the runs of a table in turn: finished ones are skipped, a stopped one goes on from its checkpoint."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evidence_plan import Plan, Run, chosen, other_keys
from evidence_table import Diverged, Row, Table, open_table, save_result
from zerodraft.bench.measure import provenance
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.common.lock import LOCK, locked
from zerodraft.training.base import LossNotFinite
from zerodraft.training.callbacks import ProgressBar, read_log
from zerodraft.training.folder import RECIPE, RESULTS, checkpoint_step, last_checkpoint
from zerodraft.training.recipe import Recipe
from zerodraft.training.strict import from_mapping
from zerodraft.training.ztt.losses import CycleLoss
from zerodraft.training.ztt.models import number_of_cycles
from zerodraft.training.ztt.run import finetune, pretrain
from zerodraft.training.ztt.stacked import StackedPaused, pretrain_stacked
from zerodraft.ztt.flops import count_flops

PASSES = 3
"""FLOPs of a training step in those of its forward pass; going back takes as many for states and again for weights."""
POINTS = 50
"""Of a loss curve."""


class Paused(Exception):
    """A run was stopped at a checkpoint."""


class PauseAt(TrainerCallback):
    """Stops a run at a checkpoint of its own when a time has come.

    Args:
        deadline: In seconds of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.pausing = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint, unless the run is over anyway."""
        if time.monotonic() >= self.deadline and state.global_step < state.max_steps:
            self.pausing = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the training."""
        if self.pausing:
            raise Paused


def make_runs(
    plan: Plan,
    file: Path,
    folder: Path,
    *,
    words: Sequence[str],
    only: str | None = None,
    minutes: float = math.inf,
    together: int = 1,
    turn: AbstractContextManager[Any] | None = None,
    timed: bool = True,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Table:
    """Makes the runs of a plan that are not done, and writes the table after each.

    Args:
        plan: The runs.
        file: With the table.
        folder: Where the runs live.
        words: The command line that makes all of them; a run is repeated by this and `--only`.
        only: Only runs of this name.
        minutes: Begin no run after this time, and stop one at a checkpoint.
        together: Train at most this many runs of an arm as one.
        turn: Entered while runs are trained as one; their preparation is outside. Runs that are trained alone take no
            turns.
        timed: Whether seconds are kept: not where others work beside these runs.
        tell: Takes a line about what happens.

    Returns:
        The table with what is done.

    Raises:
        ZerodraftError: another process makes these runs, a file is damaged, or a recipe does not fit.
    """
    deadline = time.monotonic() + 60 * minutes
    # of the code that is loaded now, whatever is checked out hours later
    loaded = provenance(seed=0, words=[])
    source = {key: loaded[key] for key in ("commit", "uncommitted_changes")}
    place = folder / plan.table
    with locked(place, f"Another process makes the runs in '{place}': wait for its end, or choose another folder."):
        table = open_table(file, plan)
        asked = {*chosen(list(plan.runs()), only)}
        while left := [run for run in table.wanted() if run in asked - table.done()]:
            alone = together == 1 or is_one_by_one(plan, left[0], place)
            group = left[:1] if alone else alike(plan, left, place)[:together]
            names = ", ".join(map(str, group))
            if time.monotonic() >= deadline:
                tell(f"The time is over; {len(left)} runs are left.")
                break
            tell(f"{names}: {len(left)} left")
            try:
                if alone:
                    made = [make_run(plan, group[0], place, [*words, "--only", names], deadline)]
                else:
                    made = make_together(plan, group, place, words, deadline, turn, tell)
            except (Paused, StackedPaused):
                tell(f"{names}: stopped at a checkpoint, the time is over; {len(left)} runs are left.")
                break
            for found in made:
                if isinstance(found, Row):
                    row = replace(
                        found, seconds=found.seconds if timed else None, provenance={**found.provenance, **source}
                    )
                    table = replace(table, rows=(*table.rows, row))
                    tell(f"{found.run}: validation loss {found.loss:.4f} after {found.tokens:,} tokens")
                else:
                    table = replace(table, diverged=(*table.diverged, found))
                    tell(f"{found.run}: {found.why}")
            save_result(table, file)
    return table


def alike(plan: Plan, left: Sequence[Run], place: Path) -> list[Run]:
    """The runs that can be trained with the first one: those of its arm whose folders hold no results yet."""
    return [run for run in left if run.arm == left[0].arm and not is_finished(plan, run, place)]


def is_one_by_one(plan: Plan, run: Run, place: Path) -> bool:
    """Whether a run cannot be trained as one with others: it is over, or begins with an existing model."""
    return is_finished(plan, run, place) or plan.recipe_of(run, place).model.start is not None


def is_finished(plan: Plan, run: Run, place: Path) -> bool:
    """Whether a run's folder holds its results."""
    return (Path(plan.recipe_of(run, place).output) / RESULTS).exists()


def make_together(
    plan: Plan,
    runs: Sequence[Run],
    place: Path,
    words: Sequence[str],
    deadline: float,
    turn: AbstractContextManager[Any] | None,
    tell: Callable[[str], None],
) -> list[Row | Diverged]:
    """Makes runs of one arm as one, or goes on with them.

    Raises:
        StackedPaused: the deadline has come.
        ZerodraftError: the recipes do not fit, or a folder holds another run.
    """
    recipes = [plan.recipe_of(run, place) for run in runs]
    found = pretrain_stacked(recipes, deadline=deadline, turn=turn, tell=lambda text: tell(f"{runs[0].arm}: {text}"))
    sizes, made = None, []
    for run, recipe, results in zip(runs, recipes, found, strict=True):
        if isinstance(results, LossNotFinite):
            made.append(Diverged(**run._asdict(), recipe=plan.changes_of(run), why=str(results)))
            continue
        sizes = sizes or sizes_of(recipe)
        command = [*words, "--only", run.arm, "--together", str(len(runs))]
        made.append(row_of(plan, run, recipe, results, sizes, command))
    return made


def make_run(plan: Plan, run: Run, place: Path, words: Sequence[str], deadline: float = math.inf) -> Row | Diverged:
    """Makes one run, or goes on with it; of a finished one only reads what is there.

    Raises:
        Paused: the deadline has come.
        ZerodraftError: the recipe does not fit, or the folder holds another run.
    """
    recipe = plan.recipe_of(run, place)
    output = Path(recipe.output)
    block = recipe.training.batch_size * recipe.training.accumulation * recipe.data.context_length
    try:
        if is_finished(plan, run, place):
            results = finished(output / RESULTS, recipe)
        else:
            begun = (output / RECIPE).exists() or (output / LOCK).exists()
            train = pretrain if recipe.model.start is None else finetune
            results = train(recipe, resume=begun, callbacks=[ProgressBar(block), PauseAt(deadline)])
    except LossNotFinite as error:
        return Diverged(**run._asdict(), recipe=plan.changes_of(run), why=str(error))
    return row_of(plan, run, recipe, results, sizes_of(recipe), words)


def finished(path: Path, recipe: Recipe) -> dict[str, Any]:
    """The results of a run that is over.

    Raises:
        ZerodraftError: they cannot be read, or are those of another recipe.
    """
    results = read_json(path, "result")
    if changed := other_keys(from_mapping(Recipe, results.get("recipe")), recipe):
        raise ZerodraftError(f"'{path.parent}' holds a run with another {', '.join(changed)}: choose another folder")
    return results


class Sizes(NamedTuple):
    """What is the same for all runs of an arm: parameters, those in layers, mean FLOPs of a training step's token."""

    parameters: int
    layer_parameters: int
    flops: float


def sizes_of(recipe: Recipe) -> Sizes:
    """The sizes of the model that a finished run left."""
    model: Any = AutoModelForCausalLM.from_pretrained(Path(recipe.output) / "model").eval()
    in_layers = sum(p.numel() for layer in model.get_decoder().layers for p in layer.parameters())
    return Sizes(model.num_parameters(), in_layers, step_flops(model, recipe))


def step_flops(model: Any, recipe: Recipe) -> float:
    """FLOPs of a training step for each of its tokens, in the mean over the steps: cycles may open late, and some
    losses read out after every cycle."""
    cycle_loss = CycleLoss(recipe.loss, number_of_cycles(model), recipe.seed)
    length, steps = recipe.data.context_length, recipe.training.steps
    asked = Counter(
        tuple(
            (name, value)
            for name, value in cycle_loss.forward_arguments(step, 0, (1, length), progress=step / steps).items()
            if name != "exit_depth"  # all cycles run, and some results are left aside
        )
        for step in range(steps)
    )
    ids = torch.zeros(1, length, dtype=torch.long)
    total = 0
    for arguments, times in asked.items():
        with count_flops() as counted, torch.no_grad():
            model(ids, labels=ids, use_cache=False, **dict(arguments))
        total += times * counted.total
    return PASSES * total / (length * steps)


def row_of(plan: Plan, run: Run, recipe: Recipe, results: dict[str, Any], sizes: Sizes, words: Sequence[str]) -> Row:
    """The figures of a finished run, from its results and its folder."""
    # a run that went on has its clock from there
    speed = results["tokens_per_second"]
    return Row(
        **run._asdict(),
        recipe=plan.changes_of(run),
        parameters=sizes.parameters,
        layer_parameters=sizes.layer_parameters,
        steps=results["steps"],
        tokens=results["tokens"],
        flops=round(sizes.flops * results["tokens"]),
        seconds=results["tokens"] / speed if speed else None,
        losses=losses_by_cycle(results["evaluation"]),
        curve=curve(read_log(Path(recipe.output) / "log.jsonl")),
        provenance=provenance(seed=run.seed, words=words),
    )


def losses_by_cycle(evaluation: dict[str, float]) -> dict[str, tuple[float, ...]]:
    """Losses after each cycle by text, from the Trainer's flat names."""
    losses: dict[str, list[float]] = {}
    for key, value in evaluation.items():
        name, found, cycle = key.removeprefix("eval_").rpartition("_loss_")
        if found and cycle.isdecimal():
            losses.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in losses.items()}


def curve(log: Sequence[dict[str, Any]], points: int = POINTS) -> tuple[tuple[float, float], ...]:
    """The mean training loss of stretches of equal length, each with its last step."""
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    length = max(1, -(-len(losses) // points))
    parts = [losses[start : start + length] for start in range(0, len(losses), length)]
    return tuple((part[-1][0], round(sum(loss for _, loss in part) / len(part), 5)) for part in parts)


def progress(plan: Plan, file: Path, folder: Path, only: str | None = None) -> list[str]:
    """A line for each run: done, diverged, begun, or left."""
    table = open_table(file, plan)
    asked = {*chosen(list(plan.runs()), only)}
    done = {row.run: f"validation loss {row.loss:.4f}" for row in table.rows} | {d.run: d.why for d in table.diverged}
    lines = []
    for run in table.wanted():
        if run in asked:
            output = Path(plan.recipe_of(run, folder / plan.table).output)
            step = checkpoint_step(last_checkpoint(output))
            lines.append(f"{run!s:32s} {done.get(run) or (f'at step {step}' if step else 'left')}")
    waiting = {seed for seed in plan.seeds if not plan.is_swept(seed)} - {run.seed for run in table.wanted()}
    if waiting:
        lines.append(f"seeds {', '.join(map(str, sorted(waiting)))}: each arm at its best rate, once that is known")
    return lines
