"""Every test runs with the annotations of the package checked: jaxtyping's shapes, by beartype, on each call."""

import os

# before transformers is imported: tests never ask a hub, whatever the machine can reach
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# before torch is imported: on tiny tensors a second OpenMP thread costs several times what it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")

import inspect
from typing import Any

import pytest

from tests import checking

checking.install()

from zerodraft import ZttCausalLMOutput, ZttConfig  # noqa: E402  # after the hook
from zerodraft.drafters.block_model import BlockDrafterConfig  # noqa: E402  # after the hook
from zerodraft.drafters.dflash_model import DFlashConfig  # noqa: E402  # after the hook
from zerodraft.drafters.masked_model import MaskedConfig  # noqa: E402  # after the hook
from zerodraft.fast import best  # noqa: E402  # after the hook


# A configuration takes keys that its signature does not name (transformers keeps them for the family), an output can
# be made from one mapping (accelerate does); arguments are checked by the signature, so these are created without it.
def checked(function: Any) -> bool:
    """Whether a function is wrapped in the check, at any depth."""
    inside = getattr(function, "__wrapped__", None)
    return "jaxtyp" in function.__code__.co_filename or (inside is not None and checked(inside))


for unchecked in (ZttConfig, BlockDrafterConfig, DFlashConfig, MaskedConfig, ZttCausalLMOutput):
    unchecked.__init__ = inspect.unwrap(unchecked.__init__, stop=lambda f: not checked(f))


@pytest.fixture(autouse=True)
def annotations() -> None:
    """Their checks begin anew."""
    checking.begin()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The targets that the automatic choice came to, call by call; None where it found none."""
    found: list[Any] = []
    best_target = best.best_target

    def noted(model: Any) -> Any:
        found.append(best_target(model))
        return found[-1]

    monkeypatch.setattr(best, "best_target", noted)
    return found
