"""What the commands that measure a target have in common: their flags, what is measured with, and tables on a
terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, metavar, settings_of
from zerodraft.cli.decoding import Drafting
from zerodraft.cli.loading import Dtype
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.common.outputs import check_file
from zerodraft.ztt.rules import NEVER

if TYPE_CHECKING:
    from zerodraft.bench.methods import Equipment
    from zerodraft.bench.tables import Table as Figures
    from zerodraft.ztt.tradeoff import Ruler


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured(Command):
    """What the commands that measure a target have in common."""

    target: str = metavar("DIR|NAME", also=("model",), default="smollm2")
    """The model that decodes."""
    dtype: Dtype = "auto"
    """Dtype of the computation; auto: as the weights are stored."""
    drafting: Drafting = settings_of(Drafting)
    ngram: str = metavar("FILE", default="")
    """A table from 'zerodraft ngram build'."""
    assistant: str = metavar("DIR|NAME", default="")
    """A small causal model, for hf_assisted."""
    dflash: str = metavar("DIR", default="")
    """A drafter in transformers' DFlash format, for hf_dflash."""
    gguf: tuple[str, ...] = metavar("FILE...", default=())
    """The target for llama.cpp, for llama_cpp_*."""
    threads: int = 0
    """Threads of torch; 0: its default."""
    seed: int = 0
    """Draws the prompts; seeds sampling."""
    output: str = metavar("FILE.json", default="")
    """Write the result; rows beside it until all are there."""

    def check(self) -> None:
        """Looks at the numbers."""
        self.drafting.check()
        self.check_least(threads=0)
        if self.output:
            check_file(self.output, "--output")

    def check_least(self, **least_of: float) -> None:
        """Raises `ZerodraftError` for a flag below its least value."""
        for name, least in least_of.items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ZerodraftError(f"--{flag} is {getattr(self, name)}; it must be at least {least}")

    def _prepare(self) -> None:
        import torch
        import transformers

        if self.threads:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        transformers.utils.logging.set_verbosity_error()

    def _fingerprints(self, prompts: Sequence[str] = (), text: str = "") -> dict[str, str]:
        """Of what is measured with, so that results of other weights or prompts can be told apart."""
        from zerodraft.bench.measure import fingerprint, weights
        from zerodraft.generate.names import shipped_drafter
        from zerodraft.models.resolve import resolve

        models = {
            "target": self.target,
            "drafter": self.drafting.drafter or str(shipped_drafter(self.target) or ""),
            "assistant": self.assistant,
            "dflash": self.dflash,
        }
        if self.drafting.drafter.partition(":")[0] in ("lookup", "self") and not Path(self.drafting.drafter).is_dir():
            models["drafter"] = ""
        files = {kind: weights(resolve(name)) for kind, name in models.items() if name}
        others = {"ngram": [self.ngram] if self.ngram else [], "gguf": self.gguf, "prompts": prompts}
        others |= {"text": [text] if text else []}
        files |= {kind: [user_path(name) for name in names] for kind, names in others.items() if names}
        return {kind: fingerprint(paths) for kind, paths in files.items()}

    def _equipment(self, model: Any, tokenizer: Any) -> "tuple[Equipment, str]":
        """What the methods need, and the drafter's name."""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        from zerodraft.bench.methods import Equipment
        from zerodraft.models.loading import load_pretrained
        from zerodraft.models.resolve import resolve
        from zerodraft.models.tokenizers import load_tokenizer

        def load(kind: Any, name: str) -> Any:
            return load_pretrained(kind, resolve(name)).to(model.device).eval() if name else None

        drafter, name = self.drafting.find(model, self.target)
        assistant = load(AutoModelForCausalLM, self.assistant)
        equipment = Equipment(
            model=model,
            drafter=drafter,
            ngram=self.ngram,
            assistant=assistant,
            tokenizers=(tokenizer, load_tokenizer(resolve(self.assistant)) if assistant else None),
            dflash=load(AutoModel, self.dflash),
            gguf=self.gguf,
            threads=torch.get_num_threads(),
        )
        return equipment, name


@dataclass(frozen=True, kw_only=True, slots=True)
class OnPrompts(Measured):
    """Methods measured on prompts."""

    prompts: tuple[str, ...] = metavar("FILE...", default=())
    """JSONL or text; by default Spec-Bench in $ZERODRAFT_DATA."""
    max_new_tokens: int = 128
    """Write at most this many tokens."""
    methods: tuple[str, ...] = metavar("NAME...", default=())
    """Methods, with spaces or commas between; by default all."""

    def check(self) -> None:
        """Looks at the numbers."""
        Measured.check(self)
        self.check_least(max_new_tokens=2)

    def _wanted(self) -> list[str]:
        # a comma before a threshold is one within a rule: latent:0.3,never
        return [name for word in self.methods for name in re.split(rf",(?!{NEVER}\b|[-+.\d])", word) if name]

    def _equipment(self, model: Any, tokenizer: Any, ruler: "Ruler | None" = None) -> "tuple[Equipment, str]":
        from zerodraft.bench.looped import exit_rules

        equipment, name = Measured._equipment(self, model, tokenizer)
        return replace(equipment, rules=exit_rules(model, self._wanted(), ruler)), name


def show_tables(tables: "Sequence[Figures]", console: Console) -> None:
    """Tables of a report; the median is enough on a terminal."""
    for table in tables:
        shown = Table(*table.header, title=table.title, title_justify="left", box=None, pad_edge=False)
        for row in table.rows:
            shown.add_row(*(cell.split(" [")[0] for cell in row))
        console.print(shown)


def show_table(result: Mapping[str, Any], console: Console) -> None:
    """The overall figures, a line for each method."""
    table = Table("method", "tokens/s", "speedup", "by prompt", "MAT", "equal", box=None, pad_edge=False)
    for name, values in result["overall"].items():
        spread, mat = values.get("speedup_by_prompt"), values["mat"]
        table.add_row(
            name,
            f"{values['tokens_per_second']:.1f}" if "tokens_per_second" in values else "",
            f"{values['speedup']:.2f}x" if "speedup" in values else "",
            f"{spread['min']:.2f} - {spread['max']:.2f}" if spread else "",
            f"{mat:.2f}" if mat is not None else "",
            f"{values['equal']}/{values['prompts']}" if "equal" in values else "",
        )
    console.print(table)
    for row in result["differences"]:
        gap = ""
        if row["top_gap"] is not None:
            gap = f", the two best logits {row['top_gap']:.1e} apart, its own {row['deficit']:.1e} below the best"
        console.print(f"{row['method']} differs on {row['id']} from token {row['place'] + 1} on{gap}")
