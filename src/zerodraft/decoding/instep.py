"""Verification as plain decoding's loop goes, token by token and with all rows in step, for what may remember.

A logits processor or a stopping criterion that is not known to be a function of one row's text can hold anything: a
grammar's state for each row, flags that are set once, a count of calls. It is therefore called as in plain decoding:
once for each token of the text, with the whole batch, processors before the token and criteria after it. Rows then
accept the same number of tokens, that of the row whose draft fails first; a row that has ended is fed the padding that
plain decoding feeds it, so even what is called with its scores sees the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zerodraft.decoding.choice import TokenChoice
from zerodraft.decoding.stats import RowStep
from zerodraft.decoding.stopping import Stopping
from zerodraft.decoding.text import Text
from zerodraft.decoding.tree import ROOT, DraftTree
from zerodraft.decoding.verify import Randomness


@dataclass(frozen=True, kw_only=True)
class InStep:
    """The loop over the tokens of one pass.

    Args:
        choice: How logits become scores, for all rows at once.
        stopping: When texts end, likewise.
        dice: Draws tokens.
        pad: What stands in rows that have ended.
        before: Called with all ids before each token, as plain decoding prepares its pass; it can refuse.
    """

    choice: TokenChoice
    stopping: Stopping
    dice: Randomness
    pad: int
    before: Callable[[Int[Tensor, "B T"]], None] | None = None

    def goes_on(self, text: Text) -> bool:
        """Whether a row still writes tokens of its own, as long as any has not ended."""
        return text.stopped_at is None or not self.stopping.pads

    def padding(self, depth: int) -> DraftTree:
        """The draft of a row that has ended, beside one of this depth."""
        return DraftTree.path([self.pad] * depth)

    def settle(
        self, texts: Sequence[Text], trees: Sequence[DraftTree], logits: Float[Tensor, "B n V"]
    ) -> tuple[list[RowStep | None], list[list[int]]]:
        """Add to all rows' texts what this pass yields; returns that, and the tokens of the pass to keep."""
        children = [tree.children() for tree in trees]
        nodes = [ROOT] * len(texts)
        paths: list[list[int]] = [[] for _ in texts]
        written: list[list[int]] = [[] for _ in texts]
        began = [self.goes_on(text) for text in texts]
        ids = _ids(texts)
        while True:
            going = [self.goes_on(text) for text in texts]
            tokens = self._choose(ids, torch.stack([logits[row, node + 1] for row, node in enumerate(nodes)]))
            for row, text in enumerate(texts):
                if not going[row]:
                    tokens[row] = self.pad
                else:
                    written[row].append(tokens[row])
                text.add(tokens[row])
            ids = _ids(texts)
            ended = self.stopping.together(ids, self.choice.so_far_together)
            for text, stops in zip(texts, ended, strict=True):
                if stops and text.stopped_at is None:
                    text.stopped_at = text.length
            found = [of_row[node + 1].get(token) for of_row, node, token in zip(children, nodes, tokens, strict=True)]
            if None in found or all(text.stopped_at is not None for text in texts):
                break
            nodes = [node for node in found if node is not None]
            for path, node in zip(paths, nodes, strict=True):
                path.append(node)
        rows: list[RowStep | None] = [
            _row_step(tree, path, own) if goes else None
            for tree, path, own, goes in zip(trees, paths, written, began, strict=True)
        ]
        return rows, [[0, *(node + 1 for node in path)] for path in paths]

    def _choose(self, ids: Int[Tensor, "B T"], logits: Float[Tensor, "B V"]) -> list[int]:
        if self.before is not None:
            self.before(ids)
        scores = self.choice.process_together(ids, logits)
        if not self.choice.sample:
            return scores.argmax(-1).tolist()
        return [self.dice.draw(p) for p in scores.softmax(-1)]


def _ids(texts: Sequence[Text]) -> Int[Tensor, "B T"]:
    return torch.cat([text.ids() for text in texts])


def _row_step(tree: DraftTree, path: list[int], tokens: list[int]) -> RowStep:
    """What a row wrote: all tokens but the target's own last one are nodes of the path, unless the text ended."""
    own = tokens[-1] if len(tokens) > len(path) else None
    return RowStep(tree.tokens.tolist(), tree.parents.tolist(), path[: len(tokens)], tokens, own)
