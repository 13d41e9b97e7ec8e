"""`zerodraft convert`: turns a plain model into a Zero Token Transformer, or back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.cli.loading import load_ztt
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.outputs import check_free, new_directory
from zerodraft.models.tokenizers import load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert(Command):
    """Turn a pretrained model into a Zero Token Transformer, or back.

    'deepen' keeps the weights and adds cycles that start closed: the logits are the base model's until they are
    trained. 'compress' keeps the depth and shares the layers between head and tail. 'to-base' undoes either where the
    plain family can compute the same.
    """

    example: ClassVar[str] = "zerodraft convert smollm2 --output smollm2-ztt --cycles 2"

    model: str = positional("MODEL", also=("model", "target"))
    """Directory, hub id or short name of the model to convert; it is not changed."""
    output: str = metavar("DIR")
    """New directory for the result."""
    mode: Literal["deepen", "compress", "to-base"] = "deepen"
    """Which conversion (see above)."""
    head_layers: int = 1
    """First layers, run once."""
    tail_layers: int = 1
    """Last layers, run once."""
    cycles: int = 2
    """How often the layers between are run."""
    init: Literal["stepwise", "average", "svd"] = "stepwise"
    """compress: shared weights are evenly spaced layers, their mean, or the mean and a LoRA."""
    ztt: dict[str, Any] = field(default_factory=dict)
    """Further settings of ZttConfig, such as --ztt.zero-rope none or --ztt.cycle-lora-rank 8."""
    unroll: bool = False
    """to-base: give every cycle layers of its own."""

    def check(self) -> None:
        """The output must be free."""
        check_free(self.output)

    def run(self, console: Console) -> Result:
        """Converts, saves the model with its tokenizer, and reports both sizes."""
        source, result, path = self._to_base() if self.mode == "to-base" else self._from_base()
        tokenizer = load_tokenizer(path) if (path / "tokenizer_config.json").is_file() else None
        with new_directory(self.output) as folder:
            result.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        before, after = source.num_parameters(), result.num_parameters()
        console.print(
            f"{self.model} ({source.config.num_hidden_layers} layers deep, {before:,} parameters) -> {self.output} "
            f"({result.config.num_hidden_layers} layers deep, {after:,} parameters)"
        )
        if tokenizer is None:
            console.print(f"no tokenizer beside {self.model}: put one into {self.output} before you generate")
        return {
            "output": self.output,
            "mode": self.mode,
            "depth": result.config.num_hidden_layers,
            "depth_before": source.config.num_hidden_layers,
            "parameters": after,
            "parameters_before": before,
        }

    def _from_base(self) -> tuple[Any, Any, Path]:
        from transformers import AutoModelForCausalLM

        from zerodraft.models.loading import load_pretrained
        from zerodraft.models.resolve import resolve
        from zerodraft.ztt.convert import from_base

        if self.unroll:
            raise ZerodraftError("--unroll belongs to --mode to-base")
        path = resolve(self.model)
        source = load_pretrained(AutoModelForCausalLM, path)
        result = from_base(
            source,
            mode=self.mode,
            head_layers=self.head_layers,
            tail_layers=self.tail_layers,
            cycles=self.cycles,
            init=self.init,
            **self.ztt,
        )
        return source, result, path

    def _to_base(self) -> tuple[Any, Any, Path]:
        from zerodraft.ztt.convert import to_base

        source, path = load_ztt(self.model, as_stored=True)
        return source, to_base(source, unroll=self.unroll), path
