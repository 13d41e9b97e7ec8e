"""A draft as a tree: several continuations that share their prefixes, verified in one pass of the target.

A single path is a tree without branches, so the engine knows only trees. Verifying a tree with a mask that lets each
node see its ancestors alone is SpecInfer's idea (arXiv 2305.09781).

Numbering: nodes are 0..n-1, parents before children; the root (`ROOT`, -1) is the last known token. Arrays that cover
the root too put it at index 0, so node i is at index i + 1: the order in which the target scores the tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from zerodraft.common.errors import ZerodraftError

ROOT = -1


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafted tokens and the node that each of them follows (`ROOT`: the last known token)."""

    tokens: Int64[np.ndarray, " n"]
    parents: Int64[np.ndarray, " n"]

    def __post_init__(self) -> None:
        fits = all(ROOT <= parent < node for node, parent in enumerate(self.parents.tolist()))
        if len(self.tokens) != len(self.parents) or not fits:
            raise ZerodraftError(
                f"A draft tree of {len(self.tokens)} tokens has the parents {self.parents.tolist()}; give one for each "
                f"token: {ROOT} for the root, or the number of an earlier node."
            )

    @staticmethod
    def from_lists(tokens: Sequence[int], parents: Sequence[int]) -> "DraftTree":
        """The tree with these nodes."""
        return DraftTree(np.array(tokens, np.int64), np.array(parents, np.int64))

    @staticmethod
    def path(tokens: Sequence[int]) -> "DraftTree":
        """The tree that is one path."""
        return DraftTree(np.array(tokens, np.int64), np.arange(-1, len(tokens) - 1))

    @staticmethod
    def from_paths(paths: Iterable[Sequence[int]], budget: int | None = None) -> "DraftTree":
        """The tree of all paths, equal prefixes merged. With a `budget` it holds at most that many nodes: paths are
        entered in their order, each as far as there is room."""
        children: list[dict[int, int]] = [{}]
        tokens: list[int] = []
        parents: list[int] = []
        for path in paths:
            node = ROOT
            for token in path:
                child = children[node + 1].get(token)
                if child is None:
                    if len(tokens) == budget:
                        break
                    child = children[node + 1][token] = len(tokens)
                    children.append({})
                    tokens.append(int(token))
                    parents.append(node)
                node = child
        return DraftTree.from_lists(tokens, parents)

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, n: int) -> "DraftTree":
        """The tree of the first n nodes."""
        return self if n >= len(self) else DraftTree(self.tokens[:n], self.parents[:n])

    def depths(self) -> Int64[np.ndarray, " nodes"]:
        """Distance of the root and of each node from the root."""
        depths = [0]
        for parent in self.parents.tolist():
            depths.append(depths[parent + 1] + 1)
        return np.array(depths, np.int64)

    def visible(self) -> Bool[np.ndarray, "nodes nodes"]:
        """The mask of the pass that scores the tree: `visible[query, key]` where the key is an ancestor of the query or
        the query itself, root included."""
        mask = np.eye(len(self) + 1, dtype=bool)
        for node, parent in enumerate(self.parents.tolist(), start=1):
            mask[node] |= mask[parent + 1]
        return mask

    def children(self) -> list[dict[int, int]]:
        """For the root and each node: its children by their tokens."""
        children: list[dict[int, int]] = [{} for _ in range(len(self) + 1)]
        for node, (token, parent) in enumerate(zip(self.tokens.tolist(), self.parents.tolist(), strict=True)):
            children[parent + 1].setdefault(token, node)
        return children


@dataclass(frozen=True, slots=True)
class SampledDraft:
    """Paths drawn at random from a lattice, and what is needed to verify them exactly.

    **Fields:** `tree` holds the paths' nodes; `attempts[i + 1]` the children of node i in the order in which the paths
    drew them, repeats included; row d of `ids` and `q` the distribution from which the tokens at depth d + 1 were drawn
    (padding has probability 0).
    """

    tree: DraftTree
    attempts: Sequence[Sequence[int]]
    ids: Int64[np.ndarray, "k m"]
    q: Float64[np.ndarray, "k m"]

    @staticmethod
    def from_paths(
        paths: Sequence[Sequence[int]], ids: Int64[np.ndarray, "k m"], q: Float64[np.ndarray, "k m"]
    ) -> "SampledDraft":
        """Paths whose tokens were drawn independently, token d of each from row d."""
        tree = DraftTree.from_paths(paths)
        children = tree.children()
        attempts: list[list[int]] = [[] for _ in children]
        for path in paths:
            node = ROOT
            for token in path:
                child = children[node + 1][token]
                attempts[node + 1].append(child)
                node = child
        return SampledDraft(tree, attempts, ids, q)
