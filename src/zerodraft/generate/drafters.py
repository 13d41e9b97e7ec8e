"""Which drafter a target gets: the one that was asked for, or the best there is for it."""

from os import PathLike, fspath
from pathlib import Path
from typing import Any

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.protocols import Drafter
from zerodraft.drafters.kinds import Denoising, check_nothing_denoised, load_kind
from zerodraft.drafters.lookup import PromptLookupDrafter
from zerodraft.drafters.own import SelfDrafter
from zerodraft.generate.names import check_name, shipped_drafter
from zerodraft.models.resolve import resolve


def find_drafter(
    name: str | PathLike[str], target: Any, target_name: str | PathLike[str], denoising: Denoising | None = None
) -> tuple[Drafter, str]:
    """The drafter of this name, and what to call it.

    Args:
        name: `lookup`, `lookup:N` (copies after the last N tokens or fewer), `self`, `self:C` (the target's first C
            cycles), a drafter's directory, a causal language model, or nothing for the best there is.
        target: The loaded target.
        target_name: The directory, hub id or short name that it was loaded from.
        denoising: For masked diffusion models.

    Raises:
        ZerodraftError: there is none of this name, or it does not fit the target.
    """
    target_name, denoising = fspath(target_name), denoising or Denoising()
    text = fspath(name) or str(shipped_drafter(target_name) or "lookup")
    check_name(text)
    start, _, number = text.partition(":")
    if start in ("lookup", "self") and not Path(text).is_dir():
        check_nothing_denoised(denoising, text)
        if start == "self":
            return SelfDrafter(target, cycles=int(number or 1)), text
        return PromptLookupDrafter(max_ngram=int(number)) if number else PromptLookupDrafter(), text
    try:
        path = resolve(text)
    except ZerodraftError as error:
        raise ZerodraftError(f"The drafter is neither lookup, lookup:N, self, self:C nor a model: {error}") from error
    return load_kind(path, target, target_name, denoising), Path(text).name
