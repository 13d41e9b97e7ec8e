"""What a pass of the lean decode path is made of, whoever computes it: tokens with their places in the cache, and
layers that run over them, all at once or in stages.

Legend: B texts, T tokens of each in this pass, N = B*T, E executions of layers, S slots that are seen, H hidden size, D
head size, nk heads of keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Complex64, Float, Int
from torch import Tensor

from zerodraft.ztt.interface import Once


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The tokens of a pass.

    Attributes:
        turns: What turns the pairs of elements of each token's queries and keys.
        biases: What is added to the attention scores, by the layers' window; None: nothing.
        past: Slot of each text's first token, and those before are in use.
        seen: Slots that there are to see, S.
        causal: Without a bias, each token sees the slots up to its own rather than all.
        masked_from: The first slot where a bias may differ from 0.
        places: Slots of the tokens, rising within a text; None: one after the other from `past` on.
        texts: Which of the cache's texts these are; None: all, in order.
        masks: The biases in other forms, for those who want them.
    """

    turns: Complex64[Tensor, "N half"]
    biases: Mapping[int | None, Float[Tensor, "B 1 T S"] | None]
    past: int
    seen: int
    causal: bool = False
    masked_from: int = 0
    places: Int[Tensor, " N"] | None = None
    texts: Int[Tensor, " B"] | None = None
    masks: Once = field(default_factory=Once)

    def pick(self, rows: Int[Tensor, " n"], places: Int[Tensor, " N"], texts: Int[Tensor, " N"] | None) -> "Tokens":
        """Some of them. With several texts (`texts` says whose each token is) every token is taken for a text of its
        own, as each may have another number left."""
        shape = (None, None) if texts is None else (slice(None), None, None)
        biases = {
            window: None if bias is None else bias.view(-1, bias.shape[-1])[rows][shape]
            for window, bias in self.biases.items()
        }
        return replace(
            self,
            turns=self.turns[rows],
            biases=biases,
            places=places[rows],
            texts=None if texts is None else texts[rows],
            masks=Once(),
        )


class Ran(NamedTuple):
    """What a stage brought: the residual stream behind its last layer; of the tapped layers what was in front of them;
    and, if wanted, the share of each token's attention that lay on the zero token, by layer and head, of those layers
    that have one."""

    x: Float[Tensor, "N H"]
    taps: dict[int, Tensor]
    masses: list[Tensor]


@runtime_checkable
class Layers(Protocol):
    """Runs packed layers."""

    def run(
        self,
        x: Float[Tensor, "N H"],
        kv: Float[Tensor, "E B nk2 S D"],
        tokens: Tokens,
        stage: range,
        *,
        head_output: Float[Tensor, "N H"] | None = None,
        taps: Sequence[int] = (),
        masses: bool = False,
        last_only: bool = False,
    ) -> Ran:
        """Run some executions, one after the other; keys and values go to the cache. `x` may be overwritten.

        Args:
            x: The stream in front of the first.
            kv: The cache; of each text the heads of keys, then those of values.
            tokens: Whose stream it is.
            stage: The executions.
            head_output: Where the head's output is kept for cycles that are fed with it: written by the stage that
                comes to the cycles, read by later ones. None if no layer is fed.
            taps: Executions in front of which the stream is wanted (as transformers has it: before the gate and scale
                of the one before). One in front of the stage is known to the stage before it, but 0.
            masses: Whether masses are wanted.
            last_only: Of the stream only the last row is wanted; for a single text.
        """
        ...

    def catch_up(
        self,
        x: Float[Tensor, "N H"],
        kv: Float[Tensor, "E B nk2 S D"],
        tokens: Tokens,
        known: int,
        known_to: int,
        *,
        head_output: Float[Tensor, "N H"] | None = None,
    ) -> Float[Tensor, "N H"]:
        """The stream behind the last execution, of one text whose first `known` tokens have been through all executions
        before `known_to` already: of these `x` and `head_output` are what came of it, of the others `x` is the stream
        in front of the first."""
        ...

    def keep(self, x: Float[Tensor, "N H"], kv: Float[Tensor, "E B nk2 S D"], tokens: Tokens, stage: range) -> None:
        """Put keys and values in the cache that each execution would make of the same stream; nothing else is
        computed."""
        ...


def is_met(tap: int, stage: range) -> bool:
    """Whether a stage comes by the place of a tap."""
    return stage.start < tap <= stage.stop or tap == stage.start == 0
