"""Finished runs of the evidence, for what looks into their models: where they lie, the text they are held to, and the
command line of such a look."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evidence_plan import OfRun, Run, other_keys
from evidence_table import Look, save_result
from harness import quiet_transformers
from zerodraft import ZttForCausalLM
from zerodraft.bench.measure import provenance
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import read_json
from zerodraft.models.loading import load_pretrained
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.training.data import TextData, build_data, read_documents
from zerodraft.training.folder import RESULTS
from zerodraft.training.recipe import Recipe
from zerodraft.training.strict import from_mapping

ROOT = Path(__file__).parent.parent


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

    def data(self, tokenizer: Any) -> TextData:
        """The text that it was trained on, and that it was not, in tokens of its tokenizer."""
        data = self.recipe.data
        return build_data(data, tokenizer, read_documents(data.train, data))


def finished_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """All finished runs in the folders of a table, `ARM/RATE/SEED` below each.

    Raises:
        ZerodraftError: there is none, or the folders are not called the same.
    """
    if other := [folder for folder in folders if folder.name != folders[0].name]:
        raise ZerodraftError(f"'{folders[0]}' and '{other[0]}' are folders of two tables: name those of one")
    found = [path.parent for folder in folders for path in sorted(folder.glob(f"*/*/*/{RESULTS}"))]
    found = [path for path in found if (path / "model").is_dir()]
    if not found:
        named = "', '".join(map(str, folders))
        raise ZerodraftError(f"no finished run in '{named}': expected ARM/RATE/SEED/{RESULTS} with a model beside it")
    runs = [_finished_run(path) for path in found]
    if twice := [run for run, times in Counter(one.run for one in runs).items() if times > 1]:
        raise ZerodraftError(f"two of the folders hold {twice[0]}: name one of them")
    return runs


def _finished_run(folder: Path) -> FinishedRun:
    recipe = from_mapping(Recipe, read_json(folder / RESULTS, "result").get("recipe"))
    arm, rate, seed = folder.parts[-3:]
    if seed != str(recipe.seed):
        raise ZerodraftError(f"'{folder}' holds a run with seed {recipe.seed}: its folder must be called so")
    return FinishedRun(folder=folder, run=Run(arm, rate, recipe.seed), recipe=recipe)


def check_same_text(runs: Sequence[FinishedRun]) -> None:
    """Raise `ZerodraftError` unless all runs read the same text with the same tokenizer."""
    for run in runs:
        changed = [key for key in other_keys(runs[0].recipe, run.recipe) if key.split(".")[0] in ("data", "tokenizer")]
        if changed:
            what = ", ".join(changed)
            raise ZerodraftError(f"{run.run} has another {what} than {runs[0].run}: these are runs of two tables")


def look_arguments(description: str | None, *, blocks: int | None = None) -> argparse.ArgumentParser:
    """The flags of every script that looks into the models of finished runs; `blocks`: the default of a flag for those
    that read text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "table", type=Path, nargs="+", metavar="RUNS/TABLE", help="folder with the runs of a table, or some of its arms"
    )
    if blocks is not None:
        parser.add_argument(
            "--blocks", type=int, default=blocks, help=f"of each text, taken evenly; 0: all (default {blocks})"
        )
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "evidence", help="folder for the result")
    return parser


def look(
    kind: type[Look],
    measure: Callable[[list[FinishedRun], argparse.Namespace], Iterable[OfRun]],
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    find: Callable[[argparse.Namespace], list[FinishedRun]] = lambda options: finished_runs(options.table),
) -> int:
    """Measures the finished runs that a command line names, and writes the result; returns the exit status.

    Args:
        kind: Of result.
        measure: From the runs and the options to what was found.
        parser: `look_arguments`, and what the script adds.
        words: The command line without the script's name; `sys.argv` by default.
        find: The runs that the options name.
    """
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    quiet_transformers()
    made = provenance(seed=0, words=["python", f"benchmarks/{kind.script}", *words])
    found: list[OfRun] = []
    try:
        for one in measure(find(options), options):
            found.append(one)
            print(f"{one.run}: measured", file=sys.stderr, flush=True)
            # whatever stops the rest, this stays
            result = kind(table=options.table[0].name, results=tuple(found), provenance=made)
            save_result(result, options.results / kind.file(result.table))
    except ZerodraftError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
