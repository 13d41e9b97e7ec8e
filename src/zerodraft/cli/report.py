"""What the training commands print when they are done."""

from typing import Any

from rich.console import Console
from rich.table import Table


def training_report(console: Console, output: str, results: dict[str, Any]) -> None:
    """Speed, and loss and perplexity after each number of cycles for every evaluation text."""
    console.print(
        f"trained {results['parameters']:,} parameters on {results['tokens']:,} tokens in {results['seconds']:.0f} s "
        f"({results['tokens_per_second']:,.0f} tokens/s)"
    )
    table = Table("text", "cycles", "loss", "perplexity", box=None, pad_edge=False)
    for key, loss in results["evaluation"].items():
        text, separator, cycles = key.removeprefix("eval_").rpartition("_loss_")
        if separator:
            perplexity = results["evaluation"][f"eval_{text}_perplexity_{cycles}"]
            table.add_row(text, cycles, f"{loss:.4f}", f"{perplexity:.2f}")
    console.print(table)
    console.print(f"written to {output}: model/, results.json, log.jsonl")
