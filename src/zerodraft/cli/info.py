"""`zerodraft info`: what a Zero Token Transformer consists of and what it costs."""

from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, positional
from zerodraft.cli.loading import find_ztt
from zerodraft.errors import ZerodraftError


@dataclass(frozen=True, kw_only=True, slots=True)
class Info(Command):
    """Show a model's unrolled depth, parameters by part, FLOPs by number of cycles, and cache size.

    Everything follows from the configuration: the weights are not read.
    """

    example: ClassVar[str] = "zerodraft info models/ztt-tiny --context 512"

    model: str = positional("MODEL")
    """Directory, hub id or short name of a Zero Token Transformer."""
    context: int = 1024
    """Tokens that the attention sees, for the FLOPs."""

    def check(self) -> None:
        """The context must be a length."""
        if self.context < 1:
            raise ZerodraftError(f"--context is {self.context}; it must be at least 1")

    def run(self, console: Console) -> Result:
        """Reads the configuration and prints what follows from it."""
        from zerodraft import ZttConfig
        from zerodraft.ztt.info import model_info
        from zerodraft.ztt.loading import load_config

        config = load_config(find_ztt(self.model))
        assert isinstance(config, ZttConfig)
        info = model_info(config, context=self.context)
        total, stored = info.parameters["total"], info.head_layers + info.shared_layers + info.tail_layers
        console.print(
            f"{info.family}, {info.depth} layers deep: {info.head_layers} head + {info.cycles} x {info.shared_layers} "
            f"shared + {info.tail_layers} tail, of which {stored} are stored"
        )
        parts = Table("parameters", "count", "share", box=None, pad_edge=False)
        for column in parts.columns[1:]:
            column.justify = "right"
        for part, count in info.parameters.items():
            parts.add_row(part.replace("_", " "), f"{count:,}", f"{count / total:.1%}")
        console.print(parts)
        costs = Table("cycles", "MFLOPs/token", "of full depth", box=None, pad_edge=False)
        for column in costs.columns:
            column.justify = "right"
        for cycles, flops in enumerate(info.flops_per_token, 1):
            costs.add_row(str(cycles), f"{flops / 1e6:,.3f}", f"{flops / info.flops_per_token[-1]:.1%}")
        console.print(costs)
        console.print(
            f"with {info.context:,} tokens of context; the cache takes {info.kv_bytes_per_token:,} bytes a token"
        )
        return info.to_dict()
