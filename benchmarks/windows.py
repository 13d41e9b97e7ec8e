"""Which layers of a pretrained model can run twice before any training: held-out loss of every window.

    ZERODRAFT_DATA=DIR python benchmarks/windows.py recipes/evidence/retrofit.yaml

Model and text are those of the plan. Writes `results/evidence/windows-TABLE.json`, from which
`python benchmarks/evidence.py report` makes a section of the page.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from evidence_plan import read_data, read_plan
from evidence_table import save_result
from evidence_windows import Window, WindowTable
from harness import quiet_transformers
from zerodraft import ZttForCausalLM
from zerodraft.bench.measure import provenance
from zerodraft.common.errors import ZerodraftError
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve
from zerodraft.training.ztt.run import evaluation_sets
from zerodraft.ztt.compare import interval

ROOT = Path(__file__).parent.parent


@torch.no_grad()
def block_losses(model: Any, ids: Int[Tensor, "rows t"]) -> Float[Tensor, " rows"]:
    """The mean loss of each block."""
    return torch.stack([model(row, labels=row, use_cache=False).loss for row in ids.split(1)])


def sweep(
    model: Any,
    texts: Mapping[str, Int[Tensor, "rows t"]],
    own: Mapping[str, Float[Tensor, " rows"]],
    *,
    widths: Sequence[int],
    firsts: Sequence[int],
    gates: Sequence[float],
) -> Iterator[Window]:
    """Every window that leaves a layer on either side.

    Args:
        model: A plain causal language model.
        texts: Blocks by name.
        own: Its `block_losses` on them.
        widths: Layers of a window.
        firsts: Layers before it.
        gates: Of its second run.

    Raises:
        ZerodraftError: there is no such window.
    """
    depth = model.config.num_hidden_layers
    places = [(first, width) for width in widths for first in firsts if 0 < first < depth - width]
    if not places:
        raise ZerodraftError(f"no window leaves a layer on either side: the model has {depth} layers")
    for first, width in places:
        looped = ZttForCausalLM.from_base(
            model, head_layers=first, tail_layers=depth - first - width, cycles=2, zero_tokens=False
        ).eval()
        assert looped.cycle_gates is not None
        for gate in gates:
            nn.init.constant_(looped.cycle_gates.weight, gate)
            increase = {name: interval(block_losses(looped, ids) - own[name]) for name, ids in texts.items()}
            yield Window(first=first, layers=width, gate=gate, increase=increase)


def main(words: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, metavar="PLAN.yaml")
    parser.add_argument("--widths", type=int, nargs="+", default=[3, 4, 6], help="layers of a window")
    parser.add_argument("--firsts", type=int, nargs="+", default=[6, 9, 12, 15, 18], help="layers before it")
    parser.add_argument("--gates", type=float, nargs="+", default=[0.25, 0.5], help="of its second run")
    parser.add_argument("--blocks", type=int, default=4, help="of each text, taken evenly (default 4)")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "evidence", help="folder for the result")
    options = parser.parse_args(words)
    quiet_transformers()
    try:
        plan = read_plan(options.plan)
        recipe = plan.recipe_of(next(plan.runs()), Path("runs"))
        if recipe.model.start is None:
            raise ZerodraftError(f"'{options.plan}' has no model.start: windows are those of an existing model")
        texts = {name: blocks.rows(options.blocks) for name, blocks in evaluation_sets(read_data(plan)).items()}
        model = load_pretrained(AutoModelForCausalLM, resolve(recipe.model.start), dtype=torch.float32).eval()
        own = {name: block_losses(model, ids) for name, ids in texts.items()}
        found = WindowTable(
            table=plan.table,
            start=recipe.model.start,
            losses={name: float(losses.mean()) for name, losses in own.items()},
            results=(),
            provenance=provenance(seed=0, words=["python", f"benchmarks/{WindowTable.script}", *words]),
        )
        for window in sweep(model, texts, own, widths=options.widths, firsts=options.firsts, gates=options.gates):
            found = replace(found, results=(*found.results, window))
            # whatever stops the rest, this stays
            save_result(found, options.results / found.file(found.table))
            told = ", ".join(f"{name} {one}" for name, one in window.increase.items())
            last = window.first + window.layers
            print(f"layers {window.first + 1} to {last}, gate {window.gate:g}: {told}", file=sys.stderr, flush=True)
    except ZerodraftError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
