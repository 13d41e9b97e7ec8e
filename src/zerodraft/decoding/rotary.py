"""Rotary frequencies that follow the length of a pass, and how far a draft may look for them to stay what they are.

transformers computes the frequencies of some kinds of rotary positions from the largest position of a pass: "longrope"
takes another set once it lies behind the original context, "dynamic" computes them anew with every position behind it.
A pass over a draft reaches further than plain decoding's pass over its first token, so drafts must end where
frequencies would change.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Horizon:
    """Where a model's frequencies change.

    Attributes:
        switches: Text lengths behind which another set holds.
        varies_from: Text length behind which each has its own; None: there is none.
    """

    switches: frozenset[int]
    varies_from: int | None

    def room(self, known: int) -> int | None:
        """How many positions a draft may have after `known` tokens; None: as many as you like."""
        rooms = [end - known for end in self.switches if end >= known]
        if self.varies_from is not None:
            rooms.append(max(self.varies_from - known, 0))
        return min(rooms, default=None)


def horizon(model: Any) -> Horizon | None:
    """That of a model, by the rotary embeddings it has; None if all frequencies are constant."""
    switches, varies = set(), []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        parameters: Any = getattr(getattr(module, "config", None), "rope_parameters", None)
        if isinstance(kinds, str):
            kinds, parameters = {None: kinds}, {None: parameters}
        elif not isinstance(kinds, dict):
            continue
        for layer_type, kind in kinds.items():
            original = (parameters or {}).get(layer_type) or {}
            if kind == "longrope":
                switches.add(int(original["original_max_position_embeddings"]))
            elif "dynamic" in kind:
                varies.append(int(getattr(module, "original_max_seq_len", module.config.max_position_embeddings)))
    return Horizon(frozenset(switches), min(varies, default=None)) if switches or varies else None
