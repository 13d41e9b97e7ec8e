"""What a target saw: its hidden states over completions, computed once and kept on disk while a drafter trains.

The target's forward pass costs more than the drafter's whole training step. Sequences are computed when they are first
asked for, so training starts at once, and later passes only read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from zerodraft.errors import ZerodraftError
from zerodraft.training.completions import Completions

HALF_LIMIT = 65504.0
"""The largest float16; hidden states beyond it (first tokens of some models) are clipped."""


class FeatureCache:
    """Hidden states of a target over the sequences of some completions, in a memory-mapped file.

    The file is sparse at first; `done` says which sequences are in it. A folder that belongs to another target, other
    completions or other taps is made anew.

    Args:
        target: the causal language model; called without gradients.
        completions: sequences of its tokens.
        taps: which hidden states, as transformers numbers them (0 embeddings, i output of layer i; the
            last after the norm).
        folder: where the files live.
    """

    def __init__(self, target: Any, completions: Completions, taps: Sequence[int], folder: Path) -> None:
        self.target, self.completions, self.taps, self.folder = target, completions, tuple(taps), folder
        self._starts = np.cumsum([0, *completions.lengths])
        hidden = target.config.get_text_config().hidden_size
        shape = (int(self._starts[-1]), len(self.taps), hidden)
        key = json.dumps(
            {"shape": shape, "taps": self.taps, "target": _fingerprint(target), "data": _digest(completions)}
        )
        fresh = not (folder / "key.json").is_file() or (folder / "key.json").read_text("utf-8") != key
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if fresh and free < 2 * int(np.prod(shape)):
            raise ZerodraftError(
                f"The target's hidden states need {2 * int(np.prod(shape)) / 1e9:.1f} GB in '{folder}', but only "
                f"{free / 1e9:.1f} GB are free: choose another cache folder, fewer completions or fewer layers."
            )
        mode: Any = "w+" if fresh else "r+"
        self._states = np.memmap(folder / "states.f16", np.float16, mode=mode, shape=shape)
        self._done = np.memmap(folder / "done.u1", np.uint8, mode=mode, shape=(len(completions),))
        if fresh:
            # last, so that a folder without it is made anew
            partial = folder / "key.partial"
            partial.write_text(key, "utf-8")
            os.replace(partial, folder / "key.json")

    @property
    def share_done(self) -> float:
        """Share of the sequences that are on disk."""
        return float(self._done.mean())

    def __contains__(self, index: int) -> bool:
        return bool(self._done[index])

    def __getitem__(self, index: int) -> Float[Tensor, "n F H"]:
        """Hidden states of one sequence, float32 on the CPU."""
        span = slice(int(self._starts[index]), int(self._starts[index + 1]))
        if not self._done[index]:
            tokens, _ = self.completions[index]
            self._states[span] = self._compute(torch.from_numpy(tokens)).numpy()
            self._done[index] = 1
        return torch.from_numpy(self._states[span].astype(np.float32))

    @torch.no_grad()
    def _compute(self, tokens: Tensor) -> Tensor:
        out = self.target(
            tokens[None].to(self.target.device), output_hidden_states=True, use_cache=False, logits_to_keep=1
        )
        states = torch.stack([out.hidden_states[tap][0] for tap in self.taps], dim=1).float()
        if not states.isfinite().all():
            raise ZerodraftError("The target's hidden states are not finite: its weights are broken, or its dtype is.")
        return states.clamp(-HALF_LIMIT, HALF_LIMIT).half().cpu()


def _fingerprint(target: Any) -> str:
    """Tells targets apart: names, shapes and the first numbers of all weights."""
    digest = hashlib.sha256()
    for name, weight in target.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}{weight.flatten()[:4].tolist()}".encode())
    return digest.hexdigest()[:16]


def _digest(completions: Completions) -> str:
    digest = hashlib.sha256(completions.lengths.tobytes() + completions.prompt_lengths.tobytes())
    for i in range(len(completions)):
        digest.update(completions[i][0].tobytes())
    return digest.hexdigest()[:16]
