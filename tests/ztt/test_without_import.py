"""A saved model in programs that never import this package: evaluation harnesses, trainers, a line of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from tests.saved import save_ztt, tiny_tokenizer
from tests.ztt.tiny import tokens
from zerodraft import ZttForCausalLM

LOAD = """
import sys
from transformers import {auto}, AutoTokenizer
assert "zerodraft" not in sys.modules
model = {auto}.from_pretrained({path!r}, {options})
AutoTokenizer.from_pretrained({path!r}, {options})
import torch
ids = torch.tensor({ids})
with torch.no_grad():
    out = model(ids)
print(type(model).__name__, out[0].double().sum().item())
model.save_pretrained({path!r} + "-again")
"""


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """A Python of its own, with its own place for modules that lie beside models, and nobody to answer questions."""
    environment = dict(os.environ, HF_MODULES_CACHE=str(tmp_path / "modules"))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ztt(tmp_path_factory.mktemp("models") / "ztt", tiny_tokenizer(), cycle_gates=True)


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
def test_loads_with_trust_remote_code(saved: Path, tmp_path: Path, auto: str) -> None:
    ids = tokens(1, 6).tolist()
    done = run(LOAD.format(auto=auto, path=str(saved), options="trust_remote_code=True", ids=ids), tmp_path)
    assert done.returncode == 0, done.stderr
    name, total = done.stdout.split()[-2:]
    model = ZttForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        here = (model if auto == "AutoModelForCausalLM" else model.model)(torch.tensor(ids))[0]
    assert name == {"AutoModelForCausalLM": "ZttForCausalLM", "AutoModel": "ZttModel"}[auto]
    assert float(total) == pytest.approx(here.double().sum().item(), abs=1e-3)
    again = Path(f"{saved}-again")
    assert [path.name for path in again.glob("*.py")] == ["zerodraft_loader.py"], "no copies of the package's files"
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((saved / "config.json").read_text())["auto_map"]


def test_is_refused_with_the_way_out_otherwise(saved: Path, tmp_path: Path) -> None:
    done = run(LOAD.format(auto="AutoModelForCausalLM", path=str(saved), options="", ids=[[1]]), tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "zerodraft":
            raise ModuleNotFoundError("No module named 'zerodraft'", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_the_package_that_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    code = LOAD.format(auto="AutoModelForCausalLM", path=str(saved), options="trust_remote_code=True", ids=[[1]])
    done = run(MISSING + code, tmp_path)
    assert done.returncode != 0
    assert "pip install zerodraft" in done.stderr


def test_pipelines(saved: Path) -> None:
    write = pipeline("text-generation", model=str(saved), max_new_tokens=5, do_sample=False)
    assert isinstance(write.model, ZttForCausalLM)
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer.encode("the cat")])
    expected = tokenizer.decode(write.model.generate(ids, max_new_tokens=5, do_sample=False)[0])
    assert write("the cat")[0]["generated_text"] == expected


def test_here_the_package_itself_loads_it(saved: Path) -> None:
    loader = saved / "zerodraft_loader.py"
    original = loader.read_text()
    loader.write_text("raise SystemExit('code beside the model ran')\n")
    try:
        for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
            assert isinstance(AutoModelForCausalLM.from_pretrained(saved, **options), ZttForCausalLM)
    finally:
        loader.write_text(original)
