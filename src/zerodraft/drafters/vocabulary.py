"""Whether a drafter's tokens can be the target's, as far as sizes tell."""

from zerodraft.common.errors import ZerodraftError

PADDING = 256
"""Rows by which two embeddings of one tokenizer may differ: unused ones at the end, and a mask."""


def check_vocabulary_size(own: int, target: int) -> None:
    """Raises `ZerodraftError` where the sizes are too different for one tokenizer."""
    if abs(own - target) > PADDING:
        raise ZerodraftError(
            f"The drafter's vocabulary has {own} tokens, the target's {target}: take a drafter with the target's "
            "tokenizer, as those of its family have."
        )
