"""The kinds of drafters that are models in a directory: a new one is a class here and its place in `KINDS`. How they
are trained is in `training/drafters/kinds.py`."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from transformers import AutoModelForCausalLM

from zerodraft.common.errors import ZerodraftError
from zerodraft.common.files import model_type
from zerodraft.decoding.protocols import Drafter
from zerodraft.drafters.autoregressive import AutoregressiveDrafter
from zerodraft.drafters.block import BlockDrafter, load_block
from zerodraft.drafters.block_model import BlockDrafterConfig
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_files import Layout, export_dflash, is_dflash, load_dflash
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


@runtime_checkable
class DrafterKind(Protocol):
    """What a directory holds, and how it comes to draft for a target.

    Attributes:
        name: What it is called in flags and messages.
        denoises: Whether its drafts follow a `Denoising`.
    """

    name: ClassVar[str]
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


@runtime_checkable
class Judged(DrafterKind, Protocol):
    """A kind whose drafts follow from the target's hidden states, so that they can be judged without decoding."""

    def network(self, path: Path, target: Any) -> Any:
        """The network in a directory, made for a loaded target, with its weights as they were saved."""
        ...


@runtime_checkable
class Exported(DrafterKind, Protocol):
    """A kind that other runtimes can run."""

    def export(self, path: Path, output: str | PathLike[str], layout: Layout) -> dict[str, Any]:
        """Writes a drafter in the files of other runtimes; returns what they have to know of it, by name.

        Raises:
            ZerodraftError: its files cannot be read, the output is not empty, or the layout cannot hold it.
        """
        ...


class Masked:
    """Masked diffusion language models (Dream, LLaDA, ours): over the target's tokens if they have the same ones, else
    through the text."""

    name: ClassVar[str] = "masked"
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

    name: ClassVar[str] = "block"
    denoises: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        return model_type(path) == BlockDrafterConfig.model_type

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        return BlockDrafter.from_pretrained(path, target)

    def network(self, path: Path, target: Any) -> Any:
        return BlockDrafter(load_block(path), target).model


class DFlash:
    """DFlash drafters, published or our own."""

    name: ClassVar[str] = "dflash"
    denoises: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        return is_dflash(path)

    def load(self, path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
        return DFlashDrafter.from_pretrained(path, target)

    def network(self, path: Path, target: Any) -> Any:
        return DFlashDrafter(load_dflash(path), target).model

    def export(self, path: Path, output: str | PathLike[str], layout: Layout) -> dict[str, Any]:
        model = load_dflash(path)
        export_dflash(model, output, layout)
        config = model.config
        return {
            "parameters": model.num_parameters(),
            "block_size": config.block_size + 1,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": config.target_layer_ids,
        }


class Autoregressive:
    """Any causal language model of transformers; through the text where its tokens are others than the target's."""

    name: ClassVar[str] = "autoregressive"
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


def kind_of(path: Path) -> DrafterKind:
    """The kind of the drafter in a directory; the last one recognises whatever the others do not."""
    return next(kind for kind in KINDS if kind.recognises(path))


def kind_that_can(ability: Any, name: str, who: str) -> tuple[Any, Path]:
    """The kind of the drafter called `name`, which must have an ability (`Judged`, `Exported`), and its directory;
    `who` asks.

    Raises:
        ZerodraftError: there is no such drafter, or its kind does not have the ability.
    """
    path = resolve(name)
    kind = kind_of(path)
    if not isinstance(kind, ability):
        able = [each.name for each in KINDS if isinstance(each, ability)]
        raise ZerodraftError(
            f"'{name}' is a {model_type(path)} model; {who} takes a {' or '.join(able)} drafter, such as 'zerodraft "
            f"train-drafter --kind {able[0]}' makes."
        )
    return kind, path


def load_kind(path: Path, target: Any, target_name: str, denoising: Denoising) -> Drafter:
    """The drafter in a directory, whatever its kind.

    Raises:
        ZerodraftError: as `DrafterKind.load`, and for a way of denoising where nothing is denoised.
    """
    kind = kind_of(path)
    if not kind.denoises:
        check_nothing_denoised(denoising, path.name)
    return kind.load(path, target, target_name, denoising)


def check_nothing_denoised(denoising: Denoising, name: str) -> None:
    """Raise `ZerodraftError` for a way of denoising that somebody chose for a drafter that has none."""
    if denoising != Denoising():
        what = f"{denoising.steps} denoising steps are" if denoising.steps != 1 else "doing without a prefix cache is"
        raise ZerodraftError(f"{what} for drafters that are masked diffusion models, and '{name}' is not one")
