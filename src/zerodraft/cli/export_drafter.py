"""`zerodraft export-drafter`: a DFlash drafter in the files of transformers, vLLM and SGLang."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.console import Console

from zerodraft.cli.command import Command, Result, positional
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import model_type
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
        from zerodraft.drafters.block_model import BlockDrafterConfig
        from zerodraft.drafters.dflash_files import export_dflash, is_dflash, load_dflash
        from zerodraft.models.resolve import resolve

        path = resolve(self.drafter)
        if not is_dflash(path):
            block = model_type(path) == BlockDrafterConfig.model_type
            why = "is a block drafter, a network that other runtimes do not have" if block else "is no DFlash drafter"
            raise ZerodraftError(f"'{self.drafter}' {why}: train one with 'zerodraft train-drafter --kind dflash'.")
        model = load_dflash(path)
        export_dflash(model, self.output, self.layout)
        config = model.config
        console.print(
            f"written to {self.output}: {model.num_parameters():,} parameters, blocks of {config.block_size + 1} "
            f"({config.block_size} tokens drafted), masks are token {config.mask_token_id}, layers "
            f"{config.target_layer_ids} of the target tapped"
        )
        if self.layout == "transformers":
            console.print(
                'transformers: model.generate(..., assistant_model=AutoModel.from_pretrained("'
                f'{self.output}"), speculation_type="dflash")'
            )
        return {
            "layout": self.layout,
            "output": self.output,
            "parameters": model.num_parameters(),
            "block_size": config.block_size + 1,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": config.target_layer_ids,
        }
