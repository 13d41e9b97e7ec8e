"""What the cycles and zero tokens of finished runs do: where attention goes, how far states move, what a cycle brings.

    python benchmarks/mechanism.py runs/evidence/small

Looks into every finished run of a table and writes `results/evidence/mechanism-TABLE.json`, from which
`python benchmarks/evidence.py report` makes a section of the page. The data of the runs must be there (ZERODRAFT_DATA).
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from evidence_mechanism import FIRST_QUERY, Mechanism, Mechanisms
from finished_runs import FinishedRun, look, look_arguments
from zerodraft import ZttForCausalLM
from zerodraft.common.errors import ZerodraftError

SAME_KEY, NO_ZERO_TOKEN = "one zero key for all cycles", "no zero token"


@torch.no_grad()
def look_into(model: ZttForCausalLM, ids: Int[Tensor, "rows t"], batch_size: int = 16) -> dict[str, Any]:
    """The figures of `Mechanism` that come from the model itself, which must attend eagerly.

    Raises:
        ZerodraftError: its cycles do not follow one another, or are gated.
    """
    config = model.config
    if config.schedule != "block" or config.cycle_gates:
        raise ZerodraftError('cycles are looked into with schedule="block" and without cycle_gates alone')
    if ids.shape[1] <= FIRST_QUERY:
        raise ZerodraftError(f"blocks of {ids.shape[1]} tokens are too short: masses count from {FIRST_QUERY} on")
    sums: dict[str, Tensor] = {}
    for batch in ids.split(batch_size):
        for name, value in _figures(model, batch).items():
            sums[name] = sums.get(name, 0) + len(batch) / len(ids) * value.double()
    return {
        "executions": tuple(f"{step.layer + 1}.{step.cycle + 1}" for step in config.steps()),
        "even_mass": float((1 / torch.arange(1, ids.shape[1] + 1)[FIRST_QUERY:]).mean()),
        **{name: _tuples(value) for name, value in sums.items()},
    }


def _figures(model: ZttForCausalLM, ids: Int[Tensor, "rows t"]) -> dict[str, Tensor]:
    """Means over one batch."""
    with states_by_cycle(model) as states:
        out = model(ids, use_cache=False, output_attentions=True)
    losses = model(ids, labels=ids, cycle_weights=(1,) * model.config.cycles).cycle_losses
    # (execution, b, h, t, s): what a row lacks to 1 lies on the zero token
    weights = torch.stack(out.attentions)[..., FIRST_QUERY:, :]
    after, before = torch.stack(states[1:]), torch.stack(states[:-1])
    return {
        "first_mass": weights[..., 0].mean((1, 3)),
        "zero_mass": (1 - weights.sum(-1)).clamp_min(0).mean((1, 3)),
        "losses": losses,
        "moved": ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean((1, 2)),
        "turned": F.cosine_similarity(after, before, dim=-1).mean((1, 2)),
    }


@contextmanager
def states_by_cycle(model: ZttForCausalLM) -> Iterator[list[Float[Tensor, "b t d"]]]:
    """Collects the states before the first cycle and after each one, of one forward pass within the context."""
    config, layers = model.config, list(model.get_decoder().layers)
    scales = None if model.cycle_scales is None else model.cycle_scales()
    states: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not states:
            states.append(args[0])

    def leave(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        states.append(out if scales is None else scales[len(states) - 1] * out)

    first, last = layers[config.head_layers], layers[config.head_layers + config.shared_layers - 1]
    hooks = [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def whole_loss(model: ZttForCausalLM, ids: Int[Tensor, "rows t"], batch_size: int = 16) -> float:
    """The mean loss over all rows."""
    parts = [len(x) / len(ids) * model(x, labels=x, use_cache=False).loss for x in ids.split(batch_size)]
    return float(torch.stack(parts).sum())


def models_without(finished: FinishedRun) -> dict[str, ZttForCausalLM]:
    """The model in which no attention has a zero token, and the one in which every cycle has the zero key of the first:
    their losses say what the weights that were trained with them have come to need."""
    model = finished.model()
    if model.zero_tokens is None:
        return {}
    models, keys = {NO_ZERO_TOKEN: finished.model(zero_tokens=False)}, model.zero_tokens.keys
    if len(keys) > 1:
        with torch.no_grad():
            keys.copy_(keys[:1].expand_as(keys))
        models[SAME_KEY] = model
    return models


def _tuples(value: Tensor) -> Any:
    rows = [[round(x, 6) for x in row] for row in value.reshape(len(value), -1).tolist()]
    return tuple(tuple(row) for row in rows) if value.ndim > 1 else tuple(row[0] for row in rows)


def measure(runs: list[FinishedRun], options: Namespace) -> Iterator[Mechanism]:
    """All runs on all texts that they were held to."""
    for finished in runs:
        data, models = finished.data(finished.tokenizer()), models_without(finished)
        model = finished.model(attn_implementation="eager")
        for name, text in {"validation": data.validation, **data.evaluation}.items():
            if text is None:
                continue
            ids = text.rows(options.blocks)
            without = {what: whole_loss(lacking, ids) for what, lacking in models.items()}
            found = look_into(model, ids)
            yield Mechanism(**finished.run._asdict(), text=name, tokens=ids.numel(), without=without, **found)


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    return look(Mechanisms, measure, look_arguments(__doc__, blocks=200), words)


if __name__ == "__main__":
    sys.exit(main())
