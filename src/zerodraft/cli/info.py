"""`zerodraft info`: what a model consists of and what it costs."""

from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zerodraft.cli.command import Command, Result, positional
from zerodraft.common.errors import ZerodraftError, printable, reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Info(Command):
    """Show a model's depth, parameters and cache; of a Zero Token Transformer also FLOPs by number of cycles.

    Everything follows from the configuration: the weights are not read.
    """

    example: ClassVar[str] = "zerodraft info models/ztt-million-exits --context 512"

    model: str = positional("MODEL", also=("model", "target"))
    """Directory, hub id, short name, GGUF file or LoRA folder."""
    context: int = 1024
    """Tokens that the attention sees, for the FLOPs."""

    def check(self) -> None:
        """The context must be a length."""
        if self.context < 1:
            raise ZerodraftError(f"--context is {self.context}; it must be at least 1")

    def run(self, console: Console) -> Result:
        """Reads the configuration and prints what follows from it."""
        from zerodraft import ZttConfig
        from zerodraft.models.loading import load_config
        from zerodraft.models.resolve import resolve
        from zerodraft.ztt.info import model_info

        config = load_config(resolve(self.model))
        if not isinstance(config, ZttConfig):
            return _plain(console, self.model, config)
        with reading(f"The configuration of '{self.model}'", "describes no model"):
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


def _plain(console: Console, name: str, config: Any) -> Result:
    """The sizes of a plain model."""
    import torch
    from transformers import AutoModelForCausalLM

    with reading(f"The configuration of '{name}'", "describes no model"):
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
        text = config.get_text_config()
        sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
        result = {"family": str(config.model_type), "parameters": {"total": int(parameters)}}
        result |= {size: getattr(text, size, None) for size in sizes}
    shown = [f"{value:,} {size.replace('_', ' ')}" for size, value in result.items() if isinstance(value, int)]
    console.print(Text(printable(f"{config.model_type}, {parameters:,} parameters")))
    console.print(Text(printable(", ".join(shown))))
    console.print("a plain model: 'zerodraft generate' decodes it with drafts, 'zerodraft convert' makes it deeper")
    return result
