"""The annotations are really checked while tests run: a wrong shape or type raises."""

import pytest
import torch

from tests import checking
from zerodraft.ztt.exits import CycleOutput, ZeroMassExit


def cycle_output(**changes: object) -> CycleOutput:
    parts = {
        "cycle": 1,
        "hidden": torch.zeros(3, 8),
        "previous": torch.zeros(3, 8),
        "zero_mass": torch.zeros(3, 2, 4),
        "readout": lambda hidden: hidden,
    }
    return CycleOutput(**{**parts, **changes})  # type: ignore[arg-type]  # wrong on purpose in the tests below


def test_right_shapes_pass() -> None:
    assert ZeroMassExit(threshold=0.5)(cycle_output()).tolist() == [False] * 3


def test_a_wrong_number_of_dimensions_raises() -> None:
    with pytest.raises(TypeError, match="hidden"):
        cycle_output(hidden=torch.zeros(3))


def test_shapes_that_disagree_raise() -> None:
    with pytest.raises(TypeError):
        cycle_output(previous=torch.zeros(4, 8))


def test_a_wrong_dtype_raises() -> None:
    with pytest.raises(TypeError):
        cycle_output(hidden=torch.zeros(3, 8, dtype=torch.int64))


def test_calls_are_checked_until_there_were_enough_in_a_test() -> None:
    rule, out = ZeroMassExit(threshold=0.5), cycle_output()
    for _ in range(checking.CALLS - 1):
        rule.score(out)
    with pytest.raises(TypeError):
        rule.score(None)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(AttributeError):
        rule.score(None)  # type: ignore[arg-type]  # not checked any more
