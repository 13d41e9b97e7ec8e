"""The kinds of drafters that are models in a directory. A new kind is one class with two methods, and its place in
`KINDS`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from transformers import AutoModelForCausalLM

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import model_type
from zerodraft.decoding.protocols import Drafter
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.drafters.block import BlockDrafter
from zerodraft.drafters.block_model import BlockDrafterConfig
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_files import is_dflash
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.masked_formats import is_masked
from zerodraft.drafters.masked_model import MaskedConfig
from zerodraft.drafters.retokenized import RetokenizedDrafter, different_tokenizers, retokenized_if_needed
from zerodraft.models.loading import load_pretrained
from zerodraft.models.resolve import resolve


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """How a masked diffusion model drafts.

    Attributes:
        steps: Denoising steps of a draft.
        prefix_cache: Keep the keys and values of known tokens, rather than compute them anew for each draft.
    """

    steps: int = 1
    prefix_cache: bool = True


class DrafterKind(Protocol):
    """What a directory holds, and how it comes to draft for a target.

    Attributes:
        denoises: Whether its drafts follow a `Denoising`.
    """

    denoises: ClassVar[bool]

    def recognises(self, path: Path) -> bool:
        """Whether the directory is of this kind."""
        ...

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        """The drafter in a directory, for a loaded target and what that is called (its tokenizer may be needed).

        Raises:
            ZerodraftError: its files cannot be read, or it does not fit the target.
        """
        ...


class Masked:
    """Masked diffusion language models (Dream, LLaDA, ours): over the target's tokens if they have the same ones, else
    through the text."""

    denoises: ClassVar[bool] = True

    def recognises(self, path: Path) -> bool:
        return is_masked(model_type(path))

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        # one of ours has the tokens of the target that it was made from, and no tokenizer beside it
        alone = model_type(path) == MaskedConfig.model_type and not (path / "tokenizer.json").is_file()
        # the mask is a token that the target need not have
        pair = None if alone else different_tokenizers(path, resolve(target_name), added=False)
        drafter = MaskedDrafter.from_pretrained(
            path,
            target,
            own_vocabulary=pair is not None,
            steps=denoising.steps,
            prefix_cache=denoising.prefix_cache,
        )
        if pair is None:
            return drafter
        through_text = RetokenizedDrafter(drafter, *pair)
        through_text.check(target.config)
        return through_text


class Block:
    """Our block-diffusion drafters."""

    denoises: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        return model_type(path) == BlockDrafterConfig.model_type

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        return BlockDrafter.from_pretrained(path, target)


class DFlash:
    """DFlash drafters, published or our own."""

    denoises: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        return is_dflash(path)

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        return DFlashDrafter.from_pretrained(path, target)


class Autoregressive:
    """Any causal language model of transformers; through the text where its tokens are others than the target's."""

    denoises: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        return True

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        model = load_pretrained(AutoModelForCausalLM, path).to(target.device).eval()
        own = AutoregressiveDrafter(model)
        drafter = retokenized_if_needed(own, path, resolve(target_name))
        if drafter is own:
            drafter = AutoregressiveDrafter(model, vocab_size=target.config.get_text_config().vocab_size)
        drafter.check(target.config)
        return drafter


KINDS: tuple[DrafterKind, ...] = (Masked(), Block(), DFlash(), Autoregressive())
"""The first that recognises a directory loads it."""


def load_kind(path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
    """The drafter in a directory, whatever its kind.

    Raises:
        ZerodraftError: as `DrafterKind.load`, and for a way of denoising where nothing is denoised.
    """
    kind = next(kind for kind in KINDS if kind.recognises(path))
    if not kind.denoises:
        check_nothing_denoised(denoising, path.name)
    return kind.load(path, target, target_name, denoising)


def check_nothing_denoised(denoising: Denoising, name: str) -> None:
    """Raise `ZerodraftError` for a way of denoising that somebody chose for a drafter that has none."""
    if denoising != Denoising():
        what = f"{denoising.steps} denoising steps are" if denoising.steps != 1 else "doing without a prefix cache is"
        raise ZerodraftError(f"{what} for drafters that are masked diffusion models, and '{name}' is none")
