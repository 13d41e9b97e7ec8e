"""What leads to a node of a draft tree, for tests."""

from zerodraft.decoding.tree import ROOT, DraftTree


def path_to(tree: DraftTree, node: int) -> list[int]:
    """The drafted tokens up to and including this node; none for the root."""
    tokens = []
    while node != ROOT:
        tokens.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return tokens[::-1]
