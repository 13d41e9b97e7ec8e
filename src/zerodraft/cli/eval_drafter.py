"""`zerodraft eval-drafter`: how far a drafter's drafts are accepted, without decoding."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Console
from rich.table import Table

from zerodraft.cli.command import Command, Result, metavar, positional
from zerodraft.common.errors import ZerodraftError

if TYPE_CHECKING:
    from zerodraft.training.drafters.acceptance import Acceptance


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalDrafter(Command):
    """Measure a block or DFlash drafter on greedy completions of its target: acceptance by position, rank, calibration.

    Use completions that it was not trained on; 'zerodraft distill' makes some. 'zerodraft bench decode' compares
    drafters of all kinds.
    """

    example: ClassVar[str] = "zerodraft eval-drafter runs/drafter/model --target smollm2 --data completions"

    drafter: str = positional("DRAFTER")
    """Directory of the drafter, or of the run that trained it."""
    target: str = metavar("DIR|NAME", also=("model",))
    """The model that it drafts for."""
    data: tuple[str, ...] = metavar("PATH")
    """Completions of the target; only the greedy ones count."""
    limit: int = 40
    """Judge at most this many completions, evenly spread; 0: all."""
    plot: str | None = metavar("PNG", default=None)
    """Draw the figures too."""

    def check(self) -> None:
        """Looks at the numbers."""
        if self.limit < 0:
            raise ZerodraftError(f"--limit is {self.limit}; it must be 0 (all) or more")

    def run(self, console: Console) -> Result:
        """Measures and reports."""
        import tempfile

        import numpy as np
        import torch

        from zerodraft.cli.decoding import load_target
        from zerodraft.drafters.kinds import Judged, kind_that_can
        from zerodraft.training.drafters.acceptance import measure_acceptance
        from zerodraft.training.drafters.completions import check_vocabulary, read_completions
        from zerodraft.training.drafters.features import FeatureCache

        if self.plot is not None:
            from zerodraft.ztt.plot import check_matplotlib

            check_matplotlib()
        kind, path = kind_that_can(Judged, self.drafter, "eval-drafter")
        completions = read_completions(self.data)
        greedy = [i for i in range(len(completions)) if completions.temperatures[i] == 0]
        greedy = [i for i in greedy if completions.lengths[i] - completions.prompt_lengths[i] >= 3]
        if not greedy:
            raise ZerodraftError(f"--data {' '.join(self.data)} holds no greedy completions: distil some.")
        if self.limit:
            greedy = [greedy[i] for i in np.unique(np.linspace(0, len(greedy) - 1, self.limit).astype(int))]
        target, _ = load_target(self.target)
        check_vocabulary(completions, target.get_input_embeddings().weight.shape[0])
        model = kind.network(path, target)
        head = target.get_output_embeddings().weight.detach()[model.draft_ids]
        taps = [*model.config.layers, target.config.get_text_config().num_hidden_layers]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            features = FeatureCache(target, completions, taps, Path(folder) / "features")
            measured = measure_acceptance(model, features, greedy, target.get_input_embeddings().weight, head)
        table = Table("position", "accepted", "first choice right", "among 4", "among 8", box=None, pad_edge=False)
        for j, share in enumerate(measured.by_position):
            ranks = measured.ranks[j]
            table.add_row(str(j + 1), *(f"{x:.3f}" for x in (share, ranks[0], ranks[:4].sum(), ranks[:8].sum())))
        console.print(table)
        console.print(
            f"{measured.mat:.2f} tokens per target pass with plain blocks, over {len(greedy)} completions "
            f"({measured.steps:,} passes)"
        )
        console.print(calibration(measured))
        if self.plot is not None:
            from zerodraft.training.drafters.acceptance_plot import plot_acceptance

            plot_acceptance(self.plot, measured, f"{Path(self.drafter).name}: {measured.mat:.2f} tokens per pass")
            console.print(f"drawn to {self.plot}")
        figures = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in asdict(measured).items()}
        return {"completions": len(greedy), **figures}


def calibration(measured: "Acceptance") -> Table:
    """How often first choices of about one probability were right."""
    table = Table("first choice's probability", "mean", "right", "slots", box=None, pad_edge=False)
    for b, count in enumerate(measured.bin_counts):
        if count:
            mean, right = measured.confidence[b], measured.correct[b]
            table.add_row(f"{b / 10:.1f} to {(b + 1) / 10:.1f}", f"{mean:.3f}", f"{right:.3f}", f"{count:,}")
    return table
