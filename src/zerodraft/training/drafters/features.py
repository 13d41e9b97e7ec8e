"""What a target saw: its hidden states over completions, computed once and kept on disk while a drafter trains.

The target's forward pass costs more than the drafter's whole training step. Sequences are computed when they are first
asked for, so training starts at once, and later passes only read. A GPU computes batches faster than it reads them:
there `FreshFeatures` stores nothing.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.outputs import write_whole
from zerodraft.training.drafters.completions import Completions

HALF_LIMIT = 65504.0
"""The largest float16; hidden states beyond it (first tokens of some models) are clipped."""

KEY, STATES, DONE = "key.json", "states.f16", "done.u1"
KEY_FIELDS = {"shape", "taps", "target", "data"}


@runtime_checkable
class Features(Protocol):
    """Hidden states of a target over the sequences of some completions."""

    completions: Completions

    def batch(self, indices: Sequence[int]) -> Float[Tensor, "B n F H"]:
        """Of some sequences, float32; anything behind the end of one."""
        ...


class FreshFeatures:
    """Hidden states that are computed whenever they are asked for, on the target's device, and stay there.

    Args:
        target: see `FeatureCache`, as are the next two; it must see nothing of what comes later.
        completions: see `FeatureCache`.
        taps: see `FeatureCache`.
        bf16: compute under bfloat16 autocast.
    """

    def __init__(self, target: Any, completions: Completions, taps: Sequence[int], *, bf16: bool = False) -> None:
        self.target, self.completions, self.taps, self.bf16 = target, completions, tuple(taps), bf16
        self._options = _few_logits(target)
        self._last: tuple[list[int], Tensor] = [], torch.empty(0)

    @torch.no_grad()
    def batch(self, indices: Sequence[int]) -> Float[Tensor, "B n F H"]:
        """See `Features`; those asked for last are still there."""
        if self._last[0] != list(indices):
            ids = pad_sequence([torch.from_numpy(self.completions[i][0]) for i in indices], batch_first=True)
            device = self.target.device
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                out = self.target(ids.to(device), output_hidden_states=True, use_cache=False, **self._options)
            self._last = list(indices), torch.stack([out.hidden_states[tap] for tap in self.taps], dim=2).float()
        return self._last[1]


class FeatureCache:
    """Hidden states of a target over the sequences of some completions, in a memory-mapped file.

    The file is sparse at first; `done` says which sequences are in it. A cache of another target, of other completions
    or of other taps is made anew.

    Args:
        target: the causal language model; called without gradients.
        completions: sequences of its tokens.
        taps: which hidden states, as transformers numbers them (0 embeddings, i output of layer i; the
            last after the norm).
        folder: where the files live; new, empty, or an earlier cache.

    Raises:
        ZerodraftError: the folder holds something else, or there is too little room.
    """

    def __init__(self, target: Any, completions: Completions, taps: Sequence[int], folder: Path) -> None:
        self.target, self.completions, self.taps, self.folder = target, completions, tuple(taps), folder
        self._options = _few_logits(target)
        self._starts = np.cumsum([0, *completions.lengths])
        hidden = target.config.get_text_config().hidden_size
        shape = (int(self._starts[-1]), len(self.taps), hidden)
        key = json.dumps(
            {"shape": shape, "taps": self.taps, "target": _fingerprint(target), "data": _digest(completions)}
        )
        sizes = {STATES: 2 * int(np.prod(shape)), DONE: len(completions)}
        fresh = _old_key(folder) != key or any(_size(folder / name) != size for name, size in sizes.items())
        done = np.zeros(len(completions), np.uint8) if fresh else np.fromfile(folder / DONE, np.uint8)
        _check_room(folder, 2 * int(completions.lengths[done == 0].sum()) * len(self.taps) * hidden)
        if fresh:
            for name in (KEY, STATES, DONE):
                (folder / name).unlink(missing_ok=True)
        mode: Any = "w+" if fresh else "r+"
        self._states = np.memmap(folder / STATES, np.float16, mode=mode, shape=shape)
        self._done = np.memmap(folder / DONE, np.uint8, mode=mode, shape=(len(completions),))
        if fresh:
            # last, so that a folder without it is made anew
            write_whole(folder / KEY, key)

    def __contains__(self, index: int) -> bool:
        return bool(self._done[index])

    def __getitem__(self, index: int) -> Float[Tensor, "n F H"]:
        """Hidden states of one sequence, float32 on the CPU."""
        span = slice(int(self._starts[index]), int(self._starts[index + 1]))
        if not self._done[index]:
            tokens, _ = self.completions[index]
            self._states[span] = self._compute(torch.from_numpy(tokens)).numpy()
            # on the disk before they count as done, whatever happens to the machine
            self._states.flush()
            self._done[index] = 1
        return torch.from_numpy(self._states[span].astype(np.float32))

    def batch(self, indices: Sequence[int]) -> Float[Tensor, "B n F H"]:
        """See `Features`; zeros behind the end of a sequence."""
        return pad_sequence([self[index] for index in indices], batch_first=True)

    @torch.no_grad()
    def _compute(self, tokens: Tensor) -> Tensor:
        ids = tokens[None].to(self.target.device)
        out = self.target(ids, output_hidden_states=True, use_cache=False, **self._options)
        states = torch.stack([out.hidden_states[tap][0] for tap in self.taps], dim=1).float()
        if not states.isfinite().all():
            raise ZerodraftError("The target's hidden states hold NaN or infinity: check its weights and its dtype.")
        return states.clamp(-HALF_LIMIT, HALF_LIMIT).half().cpu()


def _few_logits(target: Any) -> dict[str, int]:
    """A position is enough where the model can be asked for one; nobody reads the logits."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(target.forward).parameters else {}


def _old_key(folder: Path) -> str | None:
    """The key of the cache that is in the folder, which is made if need be; None where there is no whole one.

    Raises:
        ZerodraftError: it holds files that no cache wrote, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if path.suffix != ".partial"}
        key = (folder / KEY).read_text("utf-8") if KEY in names else None
        ours = names <= {STATES, DONE} if key is None else json.loads(key).keys() == KEY_FIELDS
    except OSError as error:
        raise ZerodraftError(f"The cache folder '{folder}' cannot be used: {error.strerror or error}.") from error
    except (ValueError, AttributeError):
        key, ours = None, False
    if not ours:
        raise ZerodraftError(
            f"'{folder}' holds other files than a cache of hidden states: give a new or empty folder (--cache)."
        )
    return key


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ZerodraftError(
            f"The target's hidden states need {needed / 1e9:.1f} GB more in '{folder}', but only {free / 1e9:.1f} GB "
            "are free: choose another cache folder, fewer completions or fewer layers."
        )


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
