"""`zerodraft export-drafter`: a DFlash drafter in the files of transformers, vLLM and SGLang."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.console import Console

from zerodraft.cli.command import Command, Result, positional
from zerodraft.common.outputs import check_free


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportDrafter(Command):
    """Write a DFlash drafter (see 'train-drafter --kind dflash') for other runtimes.

    Published DFlash drafters can be given too, to go from one layout to the other.
    """

    example: ClassVar[str] = "zerodraft export-drafter runs/dflash/model exported"

    drafter: str = positional("DRAFTER")
    """Directory of the drafter, or of the run that trained it."""
    output: str = positional("OUT")
    """New or empty directory to write to."""
    layout: Literal["transformers", "z-lab"] = "transformers"
    """transformers: for transformers 5.23 and vLLM; z-lab: for vLLM and SGLang."""

    def check(self) -> None:
        """The output must be free."""
        check_free(self.output)

    def run(self, console: Console) -> Result:
        """Reads, writes and says how to use it."""
        from zerodraft.drafters.kinds import Exported, kind_that_can

        kind, path = kind_that_can(Exported, self.drafter, "export-drafter")
        facts = kind.export(path, self.output, self.layout)
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
        console.print(f"written to {self.output}: {told}")
        if self.layout == "transformers":
            console.print(
                'transformers: model.generate(..., assistant_model=AutoModel.from_pretrained("'
                f'{self.output}"), speculation_type="dflash")'
            )
        return {"layout": self.layout, "output": self.output, **facts}
