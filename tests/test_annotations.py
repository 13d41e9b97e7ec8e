"""The annotations are really checked while tests run: a wrong shape or type raises."""

import pytest
import torch

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
