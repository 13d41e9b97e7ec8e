"""Training a DFlash drafter: the machinery of the block drafter (`training/drafters/block.py`) around another network.

The network is the published one (`drafters/dflash_model.py`), so what comes out runs in transformers, vLLM and SGLang
(`zerodraft export-drafter`). These runtimes draft with the target's whole LM head; so does training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.dflash_files import load_dflash
from zerodraft.drafters.dflash_model import DFlashModel, dflash_from_target
from zerodraft.training.drafters.block import train_drafter
from zerodraft.training.drafters.completions import Completions
from zerodraft.training.drafters.dflash_recipe import DFlashRecipe


def train_dflash(
    recipe: DFlashRecipe, *, resume: bool = False, callbacks: Sequence[TrainerCallback] | None = None
) -> dict[str, Any]:
    """Trains a DFlash drafter for a target; arguments, result and errors as in `train_drafter`."""
    return train_drafter(recipe, resume=resume, callbacks=callbacks, build=build_dflash)


def build_dflash(recipe: DFlashRecipe, target: Any, completions: Completions, train: Sequence[int]) -> DFlashModel:
    """The drafter that a run starts with."""
    shape = recipe.drafter
    if shape.start is not None:
        return load_dflash(shape.start).bind(target)
    vocabulary = target.get_input_embeddings().weight.shape[0]
    mask = unused_token(completions, vocabulary) if shape.mask_token is None else shape.mask_token
    if not 0 <= mask < vocabulary:
        raise ZerodraftError(f"drafter.mask_token is {mask}, but the target's tokens are 0 to {vocabulary - 1}.")
    return dflash_from_target(target, shape.layers, shape.block_size, shape.taps, mask).float()


def unused_token(completions: Completions, vocabulary: int) -> int:
    """The last token of a vocabulary that no completion holds (or the rarest one where all occur)."""
    counts = np.zeros(vocabulary, np.int64)
    for i in range(len(completions)):
        tokens, _ = completions[i]
        counts += np.bincount(tokens, minlength=vocabulary)
    return int(vocabulary - 1 - np.argmin(counts[::-1]))
