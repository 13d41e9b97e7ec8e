"""Which of a target's layers a drafter starts from. Recipes import this, and with them the help: no torch here."""

from typing import Literal, get_args

import numpy as np

from zerodraft.common.errors import ZerodraftError

Take = Literal["first", "last", "spread"]
"""Which of a target's layers to start from."""


def layers_to_take(count: int, wanted: int, take: Take) -> list[int]:
    """Numbers of `wanted` out of `count` layers (0: all), rising.

    Raises:
        ZerodraftError: there are fewer, or `take` is none of the ways.
    """
    if not 0 <= wanted <= count or take not in get_args(Take):
        raise ZerodraftError(
            f"The {take} {wanted} layers were asked for, the target has {count}: choose 1 to {count} (0: all) and "
            f"one of {', '.join(get_args(Take))}."
        )
    wanted = wanted or count
    if take == "spread":
        return np.linspace(0, count - 1, wanted).round().astype(int).tolist()
    return list(range(wanted) if take == "first" else range(count - wanted, count))
