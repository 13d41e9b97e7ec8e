"""`zerodraft bench decode`, `memory`, `kernels` and `report`: measure decoding methods and kernels, and report it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.cli.decoding import load_target
from zerodraft.cli.loading import check_tokens, text_blocks
from zerodraft.cli.measured import Measured, OnPrompts, show_table, show_tables
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.common.outputs import write_whole

if TYPE_CHECKING:
    from zerodraft.bench.decode import Settings, Task
    from zerodraft.bench.methods import Equipment
    from zerodraft.ztt.tradeoff import Ruler


BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Requests at once."""
TEXT_BLOCK, TEXT_BLOCKS = 256, 64
"""Tokens of a block of the text for the loss, and blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchDecode(OnPrompts):
    """Measure decoding methods side by side: speed, tokens a pass, and whether the tokens are the same."""

    example: ClassVar[str] = "zerodraft bench decode --prompts FILE.jsonl --limit 12 --output results/decode.json"

    limit: int = 30
    """Number of prompts, spread over the tasks; 0: all."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy, tokens are compared."""
    equality_only: bool = False
    """Compare tokens only, without timing."""
    references: str = metavar("FILE.jsonl", default="")
    """With it: tokens of plain decoding, added where missing."""
    reference_batch: int = 1
    """With it: references decoded at once; alone if one differs."""
    batch: int = 1
    """With it: prompts decoded at once."""
    text: str = metavar("FILE", default="")
    """Of a looped model: text that it has not seen, for the loss."""
    batches: tuple[int, ...] = metavar("N...", default=())
    """Of it: requests at once; by default 1 to 64 with all methods."""

    def check(self) -> None:
        """Looks at the numbers, and at what goes together."""
        OnPrompts.check(self)
        self.check_least(limit=0, batch=1, reference_batch=1, temperature=0)
        if not self.equality_only and (self.references or self.batch > 1 or self.reference_batch > 1):
            raise ZerodraftError("--references, --reference-batch and --batch belong to --equality-only")
        if self.equality_only and self.temperature:
            raise ZerodraftError("--equality-only compares greedy tokens: leave --temperature out")
        if self.equality_only and (self.text or self.batches):
            raise ZerodraftError("--equality-only measures neither loss nor batches: leave --text and --batches out")
        if self.batches and self.temperature:
            raise ZerodraftError("batches over depth are greedy: leave --temperature or --batches out")
        if any(rows < 1 for rows in self.batches):
            raise ZerodraftError(f"--batches is {self.batches}; each must be at least 1")

    def run(self, console: Console) -> Result:
        """Measures and reports."""
        from zerodraft.bench.decode import Settings, encode_all
        from zerodraft.bench.prompts import default_files, read_questions

        self._prepare()
        files = self.prompts or default_files()
        questions = read_questions(files, limit=self.limit, seed=self.seed)
        model, tokenizer = load_target(self.target, self.dtype)
        ruler = self._ruler(model, tokenizer)
        equipment, drafter = self._equipment(model, tokenizer, ruler)
        tasks = encode_all(questions, tokenizer, model, self.max_new_tokens)
        how = Settings(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)
        sha256 = self._fingerprints(files, self.text)
        settings = {
            "target": self.target,
            "dtype": self.dtype,
            "drafter": drafter,
            "drafter_steps": self.drafting.drafter_steps,
            "prefix_cache": self.drafting.prefix_cache,
            "ngram": Path(self.ngram).name,
            "prompts": [Path(file).name for file in files],
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "equality_only": self.equality_only,
            "batch": self.batch,
            "text": Path(self.text).name,
        }
        return self._measure(equipment, tasks, how, settings, sha256, ruler, console)

    def _ruler(self, model: Any, tokenizer: Any) -> "Ruler | None":
        """What measures loss, where there is a text for it."""
        from zerodraft.bench.methods import cycles_of
        from zerodraft.models.loading import context_of
        from zerodraft.ztt.tradeoff import Ruler

        looped = cycles_of(model) > 1
        if not looped and (self.text or self.batches):
            raise ZerodraftError(
                f"--text and --batches are for looped models of two cycles or more, and '{self.target}' is not one: "
                "leave them out"
            )
        if not self.text:
            return None
        length = min(TEXT_BLOCK, context_of(model.config) or TEXT_BLOCK)
        rows = text_blocks(self.text, tokenizer, length)[0].rows(TEXT_BLOCKS)
        check_tokens(int(rows.max()), model, f"'{self.text}'")
        return Ruler(model, rows)

    def _looped(
        self,
        equipment: "Equipment",
        tasks: "list[Task]",
        rows: list[dict[str, Any]],
        names: list[str],
        ruler: "Ruler | None",
        console: Console,
    ) -> Result:
        """What is told of a looped model beside its methods' speed."""
        from zerodraft.bench.looped import batches, exit_figures
        from zerodraft.bench.methods import OWN_PLAIN, cycles_of
        from zerodraft.generate.over_depth import goes_over_depth

        model, rules = equipment.model, equipment.rules
        if cycles_of(model) < 2 or self.equality_only:
            return {}
        points = {} if ruler is None else {OWN_PLAIN: ruler.full}
        points |= {} if ruler is None else {name: ruler.measure(rules[name]) for name in names if name in rules}
        found: Result = {"exits": exit_figures(rows, names, model.config.cycles, points)}
        sizes = self.batches or (() if self._wanted() or self.temperature else BATCHES)
        if sizes and goes_over_depth(model):
            rule = "calibrated" if "calibrated" in rules else "latent"

            def show(size: dict[str, Any]) -> None:
                rates = (f"{name} {rate['median']:.0f}" for name, rate in size["tokens_per_second"].items())
                console.print(f"{size['rows']} requests at once, tokens/s: {', '.join(rates)}")

            prompts = [task.tokens for task in tasks]
            told = batches(model, prompts, rules[rule], sizes, new=self.max_new_tokens, on_size=show)
            found["batches"] = {"rule": rule, **told}
        return found

    def _measure(
        self,
        equipment: "Equipment",
        tasks: "list[Task]",
        how: "Settings",
        settings: dict[str, Any],
        sha256: dict[str, str],
        ruler: "Ruler | None",
        console: Console,
    ) -> Result:
        import torch

        from zerodraft.bench.decode import check_equality, measure
        from zerodraft.bench.measure import kernels, provenance, write_result
        from zerodraft.bench.methods import BASE, Exits, available, choose
        from zerodraft.bench.rows import References, RowFile
        from zerodraft.bench.summary import figures, headline, line
        from zerodraft.bench.tables import looped_tables
        from zerodraft.common.provenance import command_line, versions

        wanted = self._wanted()
        methods = choose(wanted, available(equipment))
        model, reference = equipment.model, methods[BASE]
        if self.equality_only:
            methods = {name: method for name, method in methods.items() if name in wanted or method.ours}
            methods = {name: method for name, method in methods.items() if not isinstance(method, Exits)}
            methods.pop(BASE, None)
            if left_out := [name for name in wanted if name in equipment.rules]:
                raise ZerodraftError(f"--equality-only: with exits tokens need not be equal: leave {left_out[0]} out")
        names = list(methods)
        with_what = {"methods": names, "threads": torch.get_num_threads(), "sha256": sha256, "kernels": kernels()}
        output = user_path(self.output) if self.output else None
        rows_file = output and output.with_suffix(".rows.jsonl")
        kept = RowFile(rows_file, {**settings, **with_what, "versions": versions()})

        def show(rows: list[dict[str, Any]]) -> None:
            console.print(f"{len(rows)}/{len(tasks)} {rows[-1]['task']}: {line(rows, names)}")

        if self.equality_only:
            file = user_path(self.references) if self.references else None
            references = References(file, f"{sha256['target']} {model.dtype}")
            rows = check_equality(
                methods,
                tasks,
                how,
                model,
                kept,
                references,
                reference=reference,
                batch=self.batch,
                reference_batch=self.reference_batch,
                on_row=show,
            )
        else:
            rows = measure(methods, tasks, how, model, kept, on_row=show)
        first = headline(rows, names)
        result: Result = {
            "benchmark": "decode",
            **first,
            "settings": settings,
            "methods": {name: method.about for name, method in methods.items()},
            **figures(rows, names),
            **self._looped(equipment, tasks, rows, names, ruler, console),
            "provenance": provenance(seed=self.seed, words=command_line(), sha256=sha256),
        }
        show_table(result, console)
        show_tables([*looped_tables(result)], console)
        if output is not None:
            write_result(output, result)
            kept.remove()
            console.print(f"written to {self.output}")
        # what the file has for every prompt would only hide the rest on a terminal
        return {key: value for key, value in result.items() if key not in ("prompts", "steps")}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchMemory(OnPrompts):
    """Measure the peak of memory of decoding methods, each in a process of its own."""

    example: ClassVar[str] = "zerodraft bench memory --prompts FILE.jsonl --output results/memory.json"

    def run(self, console: Console) -> Result:
        """Measures and reports."""
        from functools import partial

        from zerodraft.bench.measure import provenance, write_result
        from zerodraft.bench.memory import measure_apart
        from zerodraft.bench.methods import FULL
        from zerodraft.bench.prompts import default_files
        from zerodraft.bench.tables import memory_tables
        from zerodraft.common.provenance import command_line

        self._prepare()
        files = self.prompts or default_files()
        found = measure_apart(partial(memory_of, self, tuple(files)), self._wanted())
        (drafter,) = {values.pop("drafter") for values in found.values()}
        result: Result = {
            "benchmark": "memory",
            "ratio": found.get(FULL, {}).get("ratio"),
            "settings": {
                "target": self.target,
                "dtype": self.dtype,
                "drafter": drafter,
                "ngram": Path(self.ngram).name,
                "prompts": [Path(file).name for file in files],
                "prompt_tokens": next(iter(found.values()))["prompt_tokens"],
                "max_new_tokens": self.max_new_tokens,
            },
            "methods": {name: values.pop("about") for name, values in found.items()},
            "memory": found,
            "provenance": provenance(seed=self.seed, words=command_line(), sha256=self._fingerprints(files)),
        }
        show_tables(memory_tables(result), console)
        if self.output:
            write_result(user_path(self.output), result)
            console.print(f"written to {self.output}")
        return result

    def measure_memory(self, files: Sequence[str], name: str) -> dict[str, Any]:
        """Of one method, in this process."""
        from zerodraft.bench.memory import PROMPT_TOKENS, measure_here
        from zerodraft.bench.prompts import read_questions

        self._prepare()
        model, tokenizer = load_target(self.target, self.dtype)
        equipment, drafter = self._equipment(model, tokenizer)
        text = "\n\n".join(question.text for question in read_questions(files))
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        inputs = {key: inputs[key][:, :PROMPT_TOKENS] for key in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {"drafter": drafter, **measure_here(equipment, name, inputs, options)}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchKernels(Measured):
    """Time the parts of a step: passes of the target, drafts, the search, zero-token attention."""

    example: ClassVar[str] = "zerodraft bench kernels --quick --output results/kernels.json"

    quick: bool = False
    """Fewer points and repeats."""

    def run(self, console: Console) -> Result:
        """Measures and reports."""
        from zerodraft.bench.kernels import kernel_sections
        from zerodraft.bench.measure import provenance, write_result
        from zerodraft.bench.sections import Effort
        from zerodraft.bench.tables import kernel_tables
        from zerodraft.common.provenance import command_line

        self._prepare()
        model, tokenizer = load_target(self.target, self.dtype)
        equipment, drafter = self._equipment(model, tokenizer)
        effort = Effort(repeats=3 if self.quick else 30, quick=self.quick)
        result: Result = {
            "benchmark": "kernels",
            "settings": {"target": self.target, "dtype": self.dtype, "drafter": drafter, "quick": self.quick},
            "sections": kernel_sections(equipment, tokenizer, effort, self.seed),
            "provenance": provenance(seed=self.seed, words=command_line(), sha256=self._fingerprints()),
        }
        show_tables(kernel_tables(result), console)
        if self.output:
            write_result(user_path(self.output), result)
            console.print(f"written to {self.output}")
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport(Command):
    """Write a page, with figures, of what the other bench commands measured."""

    example: ClassVar[str] = "zerodraft bench report results/decode.json results/kernels.json --out report.html"

    files: tuple[str, ...] = positional("RESULTS.json...")
    """What the others wrote to --output."""
    out: str = metavar("FILE")
    """The page to write, .html or .md."""
    plots: str = metavar("DIR", default="")
    """Write the figures there, as PNG."""
    what_if: str = metavar("COSTS", default="")
    """A machine to model, target_ms=30,draft_ms=4."""

    def check(self) -> None:
        """Looks at the page's name."""
        if Path(self.out).suffix.lower() not in (".html", ".md"):
            raise ZerodraftError(f"--out is '{self.out}'; name a file that ends in .html or .md")

    def run(self, console: Console) -> Result:
        """Reads and writes."""
        from zerodraft.bench.files import read_results, write_plots
        from zerodraft.bench.page import markdown
        from zerodraft.bench.report import page
        from zerodraft.bench.whatif import EXAMPLE, parse_costs
        from zerodraft.ztt.plot import check_matplotlib

        costs = parse_costs(self.what_if) if self.what_if else EXAMPLE
        as_html = Path(self.out).suffix.lower() == ".html"
        if as_html or self.plots:
            check_matplotlib()
        results = read_results(self.files)
        out = user_path(self.out)
        plots = write_plots(results, user_path(self.plots)) if self.plots else {}
        links = {
            name: {title: Path(os.path.relpath(path, out.parent)).as_posix() for title, path in files.items()}
            for name, files in plots.items()
        }
        write_whole(out, page(results, costs) if as_html else markdown(results, links))
        console.print(f"{len(results)} results -> {self.out}")
        return {
            "out": self.out,
            "results": list(results),
            "plots": [path.name for files in plots.values() for path in files.values()],
        }


def memory_of(command: BenchMemory, files: Sequence[str], name: str) -> dict[str, Any]:
    """`measure_memory` where another process finds it."""
    return command.measure_memory(files, name)
