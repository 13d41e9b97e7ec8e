"""What is noted beside results: the command, quoted so that it can be run again, versions and machine."""

import json
import shlex
import sys

import pytest
import torch

import zerodraft
from zerodraft.common.provenance import command_line, provenance


def test_a_result_says_how_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pretrain", "my recipe.yaml", "--output=runs/a"]
    for program in ("/somewhere/zerodraft", "/elsewhere/zerodraft/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, *words])
        assert command_line() == ["zerodraft", *words]
    found = json.loads(json.dumps(provenance()))
    assert shlex.split(found["command"]) == ["zerodraft", *words]
    assert found["versions"]["zerodraft"] == zerodraft.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
