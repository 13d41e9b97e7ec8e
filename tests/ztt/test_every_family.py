"""A few families that no other test names, through the checks that every family must pass or refuse in a sentence."""

import os

import pytest

from tests.ztt.every_family import Outcome, outcome, tiny_config

RIGHT = ["apertus", "cohere2", "dots1", "exaone4", "biogpt", "helium"]
REFUSED = {
    "bart": "2 self-attention modules instead of one",
    "bert": "0 self-attention modules instead of one",
    "deepseek_v32": "asks its cache for",
}
NAMED = [name for name in os.environ.get("ZERODRAFT_FAMILIES", "").split(",") if name]


@pytest.mark.parametrize("family", RIGHT)
def test_right(family: str) -> None:
    config = tiny_config(family)
    assert config is not None
    assert outcome(config) == Outcome(True, True, True, True)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    config = tiny_config(family)
    assert config is not None
    found = outcome(config)
    assert found is not None
    assert not found.cycles
    assert REFUSED[family] in found.refusal
    assert "\n" not in found.refusal


@pytest.mark.parametrize("family", NAMED)
def test_right_or_refused(family: str) -> None:
    if (config := tiny_config(family)) is None or (found := outcome(config)) is None:
        pytest.skip("no small configuration of it is made here")
    assert (found == Outcome(True, True, True, True)) == (not found.refusal)
