"""Draft trees: prefixes merge, masks show ancestors alone, merged trees hold what each held."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.paths import path_to
from zerodraft.common.errors import ZerodraftError
from zerodraft.decoding.tree import DraftTree, SampledDraft

PATHS = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6)
"""Few tokens, so that prefixes are shared and paths repeat."""


def prefixes(paths: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(path[:i]) for path in paths for i in range(1, len(path) + 1)}


def held(tree: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(path_to(tree, node)) for node in range(len(tree))]


@settings(deadline=None)
@given(paths=PATHS)
def test_a_tree_holds_each_prefix_once(paths: list[list[int]]) -> None:
    nodes = held(DraftTree.from_paths(paths))
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == prefixes(paths)


@settings(deadline=None)
@given(paths=PATHS, budget=st.integers(1, 8))
def test_under_a_budget_the_first_paths_come_first(paths: list[list[int]], budget: int) -> None:
    whole = held(DraftTree.from_paths(paths))
    assert held(DraftTree.from_paths(paths, budget)) == whole[:budget]


@settings(deadline=None)
@given(paths=PATHS)
def test_the_mask_shows_ancestors_and_self_alone(paths: list[list[int]]) -> None:
    tree = DraftTree.from_paths(paths)
    tokens = [(), *held(tree)]  # the root's prefix is empty
    expected = [[query[: len(key)] == key for key in tokens] for query in tokens]
    np.testing.assert_array_equal(tree.visible(), expected)
    assert tree.depths().tolist() == [len(path) for path in tokens]
    assert tree.visible().sum(1).tolist() == (tree.depths() + 1).tolist()


@settings(deadline=None)
@given(paths=PATHS)
def test_children_invert_parents(paths: list[list[int]]) -> None:
    tree = DraftTree.from_paths(paths)
    children = tree.children()
    for node in range(len(tree)):
        parent = int(tree.parents[node])
        assert children[parent + 1][int(tree.tokens[node])] == node
    assert sum(map(len, children)) == len(tree)


def test_a_path_is_a_tree_without_branches() -> None:
    tree = DraftTree.path([5, 6, 5])
    assert tree.parents.tolist() == [-1, 0, 1]
    np.testing.assert_array_equal(tree.visible(), np.tri(4, dtype=bool))
    empty = DraftTree.path([])
    assert (len(empty), empty.visible().tolist(), empty.depths().tolist()) == (0, [[True]], [0])


@pytest.mark.parametrize("parents", [[0], [-2], [-1, 1], [-1, 0, 0, 4]])
def test_parents_come_before_their_children(parents: list[int]) -> None:
    with pytest.raises(ZerodraftError, match="parents"):
        DraftTree.from_lists([1] * len(parents), parents)


def test_sampled_paths_remember_every_draw_in_order() -> None:
    ids = np.tile(np.arange(3), (2, 1))
    draft = SampledDraft.from_paths([[1, 0], [2], [1, 2], [1, 0]], ids, np.full((2, 3), 1 / 3))
    assert draft.tree.tokens.tolist() == [1, 0, 2, 2]
    assert draft.tree.parents.tolist() == [-1, 0, -1, 0]
    assert draft.attempts == [[0, 2, 0, 0], [1, 3, 1], [], [], []]
