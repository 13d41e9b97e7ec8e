"""`zerodraft calibrate`: finds the thresholds at which tokens leave early, and shows what it costs and saves."""

import hashlib
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.cli.loading import check_tokens, load_ztt, text_blocks
from zerodraft.cli.progress import LiveProgress
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import user_path
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.ztt.rules import rule_text, scored_names

if TYPE_CHECKING:
    from torch import Tensor

    from zerodraft.ztt.calibrate import CalibrationResult, Target
    from zerodraft.ztt.exits import ScoredRule
    from zerodraft.ztt.tradeoff import Point, Ruler

    RuleName = str
else:
    # the registry says which words fit
    RuleName = Literal[(*scored_names(), "best")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrate(Command):
    """Find the thresholds of an early-exit rule on a text, for a compute budget or a bound on the loss.

    Thresholds are placed on every other block of the text, one for all cycles and one for each; loss and FLOPs are
    measured on the blocks between, with the exits applied, and the better form is taken. The rule goes into the model's
    config.json, where 'generate --exit-rule calibrated' finds it; calibration.json and calibration.png (the
    trade-off) are written beside it. Exactly one of the four targets is needed.
    """

    example: ClassVar[str] = "zerodraft calibrate models/ztt-million-exits --text FILE --budget 0.9"

    model: str = positional("MODEL", also=("model", "target"))
    """Directory, hub id or short name of a Zero Token Transformer."""
    text: str = metavar("FILE")
    """Text to measure on (.txt, .md, .jsonl, .parquet; a folder or a glob): not what the model was trained on."""
    rule: RuleName | None = None
    """The rule; 'best' takes the one of --rules that meets the target best. By default zero-mass, or latent where no
    token could exit after a cycle with a zero token (as in a model deepened to two cycles)."""
    rules: tuple[str, ...] = metavar("all|RULE ...", default=())
    """Measure these rules too and draw them all in one plot."""
    budget: float | None = None
    """Target: at most this share of the FLOPs, such as 0.7."""
    mean_cycles: float | None = None
    """Target: at most this many cycles per token."""
    max_loss_increase: float | None = None
    """Target: at most this increase of the loss as a share, such as 0.02."""
    max_loss_nats: float | None = None
    """Target: at most this increase of the loss in nats."""
    pool: Literal["mean", "max", "min"] = "mean"
    """zero-mass: how the masses of heads and layers become one."""
    layers: Literal["all", "first", "last"] = "all"
    """zero-mass: which of the shared layers count."""
    policy: Literal["propagate", "latest"] = "propagate"
    """Where deeper cycles take keys and values of exited tokens from."""
    blocks: int = 64
    """Blocks of text, taken evenly from all of it: half to place thresholds on, half to measure on."""
    block_length: int | None = None
    """Tokens in a block (default: 256, or the model's context where that is shorter)."""
    batch_size: int = 8
    """Blocks in a forward pass."""
    output: str = metavar("DIR", default="")
    """Where calibration.json and calibration.png go instead of the model's directory."""
    dry_run: bool = False
    """Leave the model's config.json as it is."""

    def check(self) -> None:
        """Exactly one target, known rules, sizes above zero."""
        targets = (self.budget, self.mean_cycles, self.max_loss_increase, self.max_loss_nats)
        if sum(value is not None for value in targets) != 1:
            raise ZerodraftError(
                "give exactly one target: --budget, --mean-cycles, --max-loss-increase or --max-loss-nats"
            )
        for name, least in (("blocks", 1), ("block_length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ZerodraftError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        self._names(self.rule or "zero-mass")

    def run(self, console: Console) -> Result:
        """Measures, reports and writes."""
        from zerodraft.ztt.calibrate import HALVINGS, choose, halves, search, write_exit_rule
        from zerodraft.ztt.compare import compare, increase, verdict
        from zerodraft.ztt.placing import Placing
        from zerodraft.ztt.rules import has_masses
        from zerodraft.ztt.tradeoff import LEVELS, Ruler, fixed_depths

        target = self._target()
        model, path = load_ztt(self.model)
        blocks, source = self._read(load_tokenizer(path), model.config.max_position_embeddings)
        rule = self.rule or ("zero-mass" if has_masses(model.config) else "latent")
        names = self._names(rule)
        check_tokens(int(blocks.max()), model, f"'{self.text}'")
        runs = 2 * (1 + model.config.cycles) + len(names) * (1 + 2 * (len(LEVELS) + HALVINGS))
        measured, passes = "fixed depths", count(1)

        def on_batch() -> None:
            progress.show(measured, next(passes), runs * ruler.passes)

        with LiveProgress(console) as progress:
            before, ruler = (Ruler(model, half, self.policy, self.batch_size, on_batch) for half in halves(blocks))
            fixed_before, fixed = fixed_depths(before), fixed_depths(ruler)
            curves: dict[str, tuple[Point, ...]] = {}
            refused: dict[str, str] = {}
            for measured in names:
                try:
                    placing = Placing(before, self._template(measured), fixed_before)
                    curves[measured] = search(ruler, placing.for_all, LEVELS, target)
                    curves[_each(measured)] = search(ruler, placing.for_each, placing.prices(), target)
                except ZerodraftError as error:
                    curves[measured], refused[measured] = (), str(error)
        found: dict[str, CalibrationResult] = {}
        for name in curves:
            if name in refused:
                continue
            try:
                found[name] = choose(ruler, curves[name], target)
            except ZerodraftError as error:
                refused[name] = str(error)
        candidates = [name for name in found if rule == "best" or name in (rule, _each(rule))]
        if not candidates:
            raise ZerodraftError(next(iter(refused.values())) if rule == "best" else refused[rule])
        best = target.best([found[name].chosen for name in candidates])
        result = next(found[name] for name in candidates if found[name].chosen == best)
        compared = compare(ruler, result.chosen, fixed)
        met = [point for point in fixed if target.met_by(point)]
        best_fixed = compared[fixed.index(target.best(met))] if met else None
        report = {
            **result.to_dict(),
            "text": source,
            "fixed": [asdict(point) for point in fixed],
            "loss_increase_interval": asdict(increase(ruler, result.chosen)),
            "against_fixed": [asdict(depth) for depth in compared],
            "best_fixed": None if best_fixed is None else best_fixed.cycles,
            "verdict": verdict(result.chosen, best_fixed),
            "rules": {
                name: {
                    "chosen": asdict(found[name].chosen) if name in found else None,
                    "curve": [asdict(point) for point in curves[name]],
                }
                for name in curves
            },
        }
        _table(console, ruler, fixed, found)
        for name, why in refused.items():
            console.print(f"{name}: {why}")
        for name in names:
            if name in found and _each(name) in found:
                console.print(_forms(name, found[name].chosen, found[_each(name)].chosen, target))
        console.print(report["verdict"])
        files = self._write(console, path, report, curves, fixed, result.chosen)
        if not self.dry_run:
            write_exit_rule(model, result.rule, path)
            console.print(f"{_rule_text(result.chosen)} is now the calibrated exit rule of {self.model}")
        return {**report, "written": files}

    def _names(self, rule: str) -> list[str]:
        known = list(scored_names())
        for name in self.rules:
            if name not in (*known, "all"):
                from zerodraft.common.errors import did_you_mean

                raise ZerodraftError(f"--rules: unknown rule '{name}'{did_you_mean(name, [*known, 'all'])}")
        if rule == "best" and not self.rules:
            return known
        return [name for name in known if name == rule or name in self.rules or "all" in self.rules]

    def _target(self) -> "Target":
        from zerodraft.ztt.calibrate import ComputeBudget, LossBound

        if self.budget is not None or self.mean_cycles is not None:
            return ComputeBudget(flops=self.budget, mean_cycles=self.mean_cycles)
        return LossBound(relative=self.max_loss_increase, absolute=self.max_loss_nats)

    def _template(self, name: str) -> "ScoredRule":
        from zerodraft.ztt.exits import ZeroMassExit
        from zerodraft.ztt.tradeoff import scored_rule

        if name == "zero-mass":
            return ZeroMassExit(threshold=0.0, pool=self.pool, layers=self.layers)
        return scored_rule(name)

    def _read(self, tokenizer: Any, longest: int) -> "tuple[Tensor, dict[str, Any]]":
        """The blocks, and what they are: nothing in it depends on where the files are on this machine."""
        from zerodraft.training.rows import content

        length = min(256, longest) if self.block_length is None else self.block_length
        if length > longest:
            raise ZerodraftError(f"--block-length is {length}; the model reads at most {longest} tokens")
        packed, documents = text_blocks(self.text, tokenizer, length)
        digest = hashlib.sha256("".join(map(content, documents)).encode()).hexdigest()
        rows = packed.rows(self.blocks)
        anywhere = not self.text.startswith(("/", "~"))
        name = self.text if anywhere else Path(self.text).name
        return rows, {"name": name, "sha256": digest, "blocks": len(rows)}

    def _write(
        self,
        console: Console,
        path: Path,
        report: Result,
        curves: "dict[str, tuple[Point, ...]]",
        fixed: "list[Point]",
        chosen: "Point",
    ) -> list[str]:
        """Writes the report and the plot; without matplotlib it says so and goes on."""

        from zerodraft.common.outputs import write_json
        from zerodraft.common.provenance import provenance
        from zerodraft.ztt.plot import plot_trade_off

        folder = user_path(self.output) if self.output else path
        write_json(folder / "calibration.json", {**report, **provenance()}, indent=1)
        names = ["calibration.json"]
        try:
            title = f"{path.name} on {'/'.join(Path(report['text']['name']).parts[-2:])}"
            plot_trade_off(folder / "calibration.png", curves, fixed=fixed, chosen=chosen, title=title)
            names.append("calibration.png")
        except ZerodraftError as error:
            console.print(f"no plot: {error}")
        console.print(f"written to {self.output or self.model}: {', '.join(names)}")
        return names


def _each(rule: str) -> str:
    """What a rule with a threshold for each cycle is called in reports and plots."""
    return f"{rule}, each cycle"


def _forms(name: str, one: "Point", each: "Point", target: "Target") -> str:
    """Which form of a rule is better, in words."""
    first, second = ("one for each cycle", each), ("one for all", one)
    if target.best([each, one]) is one:
        first, second = second, first
    (better, point), (worse, other) = first, second
    return (
        f"{name}: of its thresholds {better} is better (loss {point.loss:.4f} at {point.flops:.1%} of the FLOPs) than "
        f"{worse} ({other.loss:.4f} at {other.flops:.1%}), on blocks that neither was placed on."
    )


def _table(console: Console, ruler: "Ruler", fixed: "list[Point]", found: "dict[str, CalibrationResult]") -> None:
    from zerodraft.ztt.compare import increase

    table = Table("exit rule", "cycles/token", "FLOPs", "loss", "increase [95%]", "", box=None, pad_edge=False)
    rows = [("none", ruler.full), *((f"cycles:{n}", point) for n, point in enumerate(fixed, 1))]
    for name, point in [*rows, *((_rule_text(result.chosen), result.chosen) for result in found.values())]:
        more = ("", "") if point.rule is None else (str(increase(ruler, point)), f"{point.relative_increase:+.2%}")
        table.add_row(name, f"{point.mean_cycles:.2f}", f"{point.flops:.1%}", f"{point.loss:.4f}", *more)
    console.print(table)


def _rule_text(point: "Point") -> str:
    """`zero-mass:0.4321`, as `generate --exit-rule` takes it."""
    assert point.rule is not None
    return rule_text(point.rule)
