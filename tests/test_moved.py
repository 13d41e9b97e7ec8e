"""Modules that have moved can still be imported by the names that they had."""

import subprocess
import sys
from importlib import import_module

import pytest

from zerodraft.moved import MOVED, TARGETS


@pytest.fixture(scope="module", autouse=True)
def _package() -> None:
    sys.modules.pop(TARGETS, None)
    with pytest.warns(DeprecationWarning, match="zerodraft.targets is no more"):
        import_module(TARGETS)


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_gives_the_module_of_today(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        module = import_module(old)
    assert module is import_module(MOVED[old])
    assert module.__name__ == MOVED[old]


def test_in_a_program() -> None:
    code = """
from zerodraft.targets import resolve
from zerodraft.targets.compiled import kernels
from zerodraft.errors import ZerodraftError
from zerodraft.decoding.huggingface import DiffuSpec
import zerodraft.training.run
import zerodraft

assert callable(resolve)
assert ZerodraftError is zerodraft.ZerodraftError
assert DiffuSpec is zerodraft.DiffuSpec
assert zerodraft.training.run.__name__ == "zerodraft.training.ztt.run"
assert kernels.__module__ == "zerodraft.fast.compiled"
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<string>:2: DeprecationWarning: zerodraft.targets is no more" in done.stderr
    assert "<string>:3: DeprecationWarning: zerodraft.targets.compiled is now zerodraft.fast.compiled" in done.stderr


def test_a_name_that_never_was() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        import_module("zerodraft.targets.nothing")
