"""lm-evaluation-harness with our models: its `HFLM`, which reads with an exit rule and writes with drafts.

Its class is made where it is asked for, as lm-eval is the extra `eval`. `lm_eval` has no plug-ins, so its command line
with our model in it is `python -m zerodraft.evaluation`.
"""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from zerodraft.common.errors import ZerodraftError, reading
from zerodraft.decoding.stats import DecodeStats
from zerodraft.evaluation.likelihood import Answer, Cost, Reader
from zerodraft.evaluation.questions import TASKS, read_questions
from zerodraft.generate.decoder import decoder
from zerodraft.models.loading import default_device, load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.ztt.rules import rule_of

NAME = "zerodraft"
"""What the model is called in lm-eval's registry."""

LOCAL = Path(__file__).with_name("tasks")
"""Definitions of the tasks whose questions come from files."""

SEED = 1234
"""lm-eval's own, for the examples before a question."""


def check_installed() -> None:
    """Raise `ZerodraftError` where lm-evaluation-harness is missing."""
    if find_spec("lm_eval") is None:
        raise ZerodraftError("lm-evaluation-harness is not installed: pip install 'zerodraft[eval]'")


@cache
def harness_model() -> type[Any]:
    """The class `ZerodraftLM`, which lm-eval then knows as `zerodraft`.

    Raises:
        ZerodraftError: lm-evaluation-harness is not installed.
    """
    check_installed()
    import torch
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]  # an extra
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]  # an extra
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    @register_model(NAME)
    class ZerodraftLM(HFLM):
        """A causal language model of transformers or a Zero Token Transformer, as lm-eval asks it.

        Args:
            pretrained: The model, or its directory, hub id or short name.
            tokenizer: Its tokenizer; that of the directory by default.
            exit_rule: `NAME:VALUE`, `calibrated` or `off`, for a Zero Token Transformer.
            drafter: Drafts for the texts it writes, which stay the same; as for `zerodraft.decoder`.
            dtype: What it computes in; `auto`: float32 on CPUs, else as stored.
            device: Where; by default the accelerator if there is one.
            batch_size: Texts in a pass.
            **options: Further ones of `HFLM`.

        Attributes:
            reader: Reads texts; what that took is its `cost`.
            written: Statistics of each call that wrote texts.
        """

        def __init__(
            self,
            pretrained: Any,
            tokenizer: Any = None,
            *,
            exit_rule: str = "off",
            drafter: Any = "",
            dtype: str = "auto",
            device: str | None = None,
            batch_size: int | str = 8,
            **options: Any,
        ) -> None:
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise ZerodraftError(f"batch_size is {batch_size!r}; expected a whole number from 1 up")
            if isinstance(pretrained, str):
                # lm_eval names a GPU whether there is one or not
                place = torch.device(device) if device and torch.accelerator.is_available() else default_device()
                dtype, path = "float32" if dtype == "auto" and place.type == "cpu" else dtype, resolve(pretrained)
                loaded: Any = load_pretrained(AutoModelForCausalLM, path, dtype=dtype)
                pretrained = loaded.to(place).eval()
                tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
            super().__init__(pretrained, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **options)
            rule = rule_of(pretrained, exit_rule)
            self.reader = Reader(model=pretrained, batch_size=int(batch_size), rule=rule, max_length=self.max_length)
            self.written: list[DecodeStats] = []
            self._drafter, self._decode = drafter, None

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Answer]:
            with tqdm(total=len(requests), disable=disable_tqdm, desc="reading") as bar:
                found = self.reader.answers([(before, after) for _, before, after in requests], bar.update)
            for (texts, _, _), answer in zip(requests, found, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return found

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            if self._decode is None:
                self._decode = decoder(self.model, self._drafter)
            if self.reader.rule is not None:
                options["exit_rule"] = self.reader.rule
            out = super()._model_generate(context, max_length, stop, custom_generate=self._decode, **options)
            if self._decode.last_stats is not None:
                self.written.append(self._decode.last_stats)
            return out

    return ZerodraftLM


class Score(NamedTuple):
    """A model on a task.

    Attributes:
        task: Its name.
        samples: Questions that were asked.
        metrics: lm-eval's, with their standard errors (`acc`, `acc_stderr`).
        cost: FLOPs for each token that was read, and with an exit rule its mean depth; tokens for each pass of the
            target where texts were written.
    """

    task: str
    samples: int
    metrics: dict[str, float]
    cost: dict[str, float]


@cache
def task_manager(data: Path | None, *, ours: bool) -> Any:
    """lm-eval's index of our tasks, which read from a folder, or of its own: that takes seconds."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  # an extra

    if not ours:
        return TaskManager()
    metadata = {} if data is None else {"data": str(data)}
    return TaskManager(include_path=str(LOCAL), include_defaults=False, metadata=metadata)


def load_task(task: str, data: Path | None) -> Any:
    """A task or a group of lm-eval, with its questions.

    Args:
        task: Its name, or a YAML file that describes one.
        data: Folder of the files that one of `questions.TASKS` is read from; None: lm-eval fetches it.

    Raises:
        ZerodraftError: an unknown task, or one whose questions cannot be had.
    """
    if data is not None and task in TASKS:
        # a line that is no question is told in a sentence of ours
        read_questions(task, data)
    if task.endswith(".yaml") or (data is not None and task in TASKS):
        manager, fetched = task_manager(data, ours=True), "could not be read"
    else:
        manager, fetched = task_manager(None, ours=False), "could not be fetched"
        if task not in manager.all_tasks:
            raise ZerodraftError(
                f"lm-eval has no task '{task}' ('lm_eval ls tasks' lists all); from files there are {', '.join(TASKS)}"
            )
    with reading(f"The task '{task}'", fetched):
        loaded = manager.load(task)
    for each in loaded["tasks"].values():
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=SEED)
    return loaded


def scores(lm: Any, loaded: Any, limit: int = 0) -> list[Score]:
    """What a `ZerodraftLM` reaches on a task from `load_task`, or on each one of a group.

    Args:
        lm: The model.
        loaded: The task.
        limit: Ask only this many questions, the first ones; 0: all.
    """
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]  # an extra

    lm.reader.cost, lm.written = Cost(), []
    # its bars are for a terminal, and what it prints is not the answer
    place = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(place), redirect_stderr(place):
        found = evaluate(lm, loaded, limit=limit or None, log_samples=False, bootstrap_iters=1000)
    cost = lm.reader.cost.to_dict() | tokens_per_pass(lm.written)
    return [
        Score(name, found["n-samples"][name]["effective"], _metrics(found["results"][name]), cost)
        for name in loaded["tasks"]
    ]


def tokens_per_pass(written: Sequence[DecodeStats]) -> dict[str, float]:
    """Of all texts together; nothing where none was written."""
    passes = sum(one.row_steps for one in written)
    return {"tokens_per_pass": sum(one.new_tokens - one.rows for one in written) / passes} if passes else {}


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """lm-eval's numbers; the filter that follows a comma is named where it is not the usual one."""
    numbers = {name: value for name, value in results.items() if "," in name and isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}
