"""The two things that the engine talks to: a target that scores drafts and a drafter that makes them.

Both are protocols: `decoding` knows no model. A target is anything that can score a tree of tokens after what it has
cached; a drafter is anything that fills the next k positions. What passes between them (the target's hidden states that
a drafter asked for) goes through the engine untouched.

Legend: B rows of the batch, T tokens of one call, V vocabulary, H hidden size, F tapped hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.lattice import Lattice


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """One forward pass of the target: scores of the token after each position, and the tapped hidden states."""

    logits: Float[Tensor, "B scored V"]
    taps: Float[Tensor, "B T F H"] | None


@runtime_checkable
class Target(Protocol):
    """A causal language model with its cache, for one call of generate.

    `device` is where ids and masks are expected. The cache starts empty.
    """

    device: torch.device

    def prefill(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], taps: Sequence[int]) -> TargetOutput:
        """Cache the prompts (left-padded, `mask` false on padding). `logits` are of the last position only: (B, 1, V);
        `taps` cover all T positions. A tap i is `hidden_states[i]` of transformers: 0 the embeddings, i the output of
        layer i. Prompts may come in several calls; each continues the cache."""
        ...

    def score(
        self,
        ids: Int[Tensor, "B T"],
        depth: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T T"],
        taps: Sequence[int],
    ) -> TargetOutput:
        """Score T more tokens, each seeing all that its row has cached and those of `ids` that `visible[b, query, key]`
        allows. `depth` is the distance from the row's cached end (0 for the first), which gives rotary positions."""
        ...

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Of the last `score`'s tokens keep in the cache those at these indices (one rising list a row) alone."""
        ...


@runtime_checkable
class LastingTarget(Target, Protocol):
    """A target whose cache can serve another text that begins like the last one."""

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that its cache takes."""
        ...

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond these lengths, one for each row."""
        ...

    def goes_on_from(self, earlier: Target) -> bool:
        """Whether this fresh target would cache the numbers that an earlier one of the model has cached."""
        ...


@runtime_checkable
class ExportingTarget(Target, Protocol):
    """A target that can hand what it has cached to transformers."""

    def export(self, cache: Any, columns: int | None = None) -> None:
        """Put the text's keys and values, or those of its first columns, into a transformers `Cache`: an empty one, or
        the one that decoding began with."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What became known of one row: `tokens` (new ones, accepted and then the target's own), and the hidden states of
    the positions whose forward pass is done.

    Over a whole session `taps` trail `tokens` by one position: the last token has not been through the target yet. At
    the first call `tokens` are the prompt and the first new token, `taps` those of the prompt.
    """

    tokens: Int[Tensor, "n"]
    taps: Float[Tensor, "m F H"] | None


@runtime_checkable
class DraftSession(Protocol):
    """A drafter at work on the rows of one generate call."""

    def observe(self, progress: Sequence[Progress]) -> None:
        """Take note of what became known, one entry a row, before the next `propose`; a finished row's is empty."""
        ...

    def propose(self, lengths: Sequence[int]) -> Sequence[Lattice]:
        """Candidates for the next `lengths[b]` positions of each row (0: none wanted). A shorter lattice is allowed."""
        ...

    def rewind(self, row: int, length: int) -> None:
        """Take back all but the first `length` tokens that a row was told, and the hidden states of all but as many
        positions; what is told next goes on from there. Asked for where texts share a beginning alone (`kept.py`)."""
        ...


@runtime_checkable
class JoiningSession(DraftSession, Protocol):
    """A session that wants to know the target which verifies its drafts."""

    def join(self, target: Target) -> None:
        """This is it; told once, before all else."""
        ...


def join(session: DraftSession, target: Target) -> None:
    """Tell a session its target, if it wants to know."""
    if isinstance(session, JoiningSession):
        session.join(target)


@runtime_checkable
class CopyingSession(DraftSession, Protocol):
    """A session that copies from the text, and can ask a model for drafts beside the copies.

    `longest` is the most positions that the model may be asked for in the next `propose` (0: copies alone), `asked` how
    many it was asked for in the last one; None: copies left it nothing to gain.
    """

    longest: int
    asked: int | None


@runtime_checkable
class Drafter(Protocol):
    """Anything that fills the next k positions.

    `taps` are the target's hidden states that it wants to see (numbered as in `Target.prefill`), `max_length` the most
    positions that it can fill at once.
    """

    @property
    def taps(self) -> Sequence[int]: ...

    @property
    def max_length(self) -> int: ...

    def check(self, config: Any) -> None:
        """Raise `ZerodraftError` where this drafter does not fit a target with this transformers config."""
        ...

    def start(self, batch: int, device: torch.device, generator: torch.Generator | None) -> DraftSession:
        """A session for `batch` rows."""
        ...


def check_drafter(drafter: Any) -> None:
    """Raise `ZerodraftError` for anything but a drafter, such as a bare model."""
    if not isinstance(drafter, Drafter):
        raise ZerodraftError(
            f"A {type(drafter).__name__} was given as the drafter: expected one of zerodraft's, such as "
            "PromptLookupDrafter() or AutoregressiveDrafter(MODEL), or for 'zerodraft.decoder' the name of one."
        )


@runtime_checkable
class EndingDrafter(Drafter, Protocol):
    """A drafter that knows more tokens which end a text than its tokenizer names."""

    eos_ids: frozenset[int]
