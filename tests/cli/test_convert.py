"""`zerodraft convert`: both directions and back, and nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from zerodraft import ZttForCausalLM
from zerodraft.cli.main import main

LOOPS = ["--ztt.input-injection", "true", "--ztt.cycle-scales", "true"]


@pytest.mark.parametrize("words", [[], LOOPS], ids=["as it is", "fed again and scaled"])
def test_deepen_writes_a_model_with_the_same_logits_and_the_tokenizer(
    words: list[str], plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "ztt"
    assert main(["convert", str(plain_dir), "--output", str(out), "--cycles", "3", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["depth_before"], found["depth"]) == (4, 8)
    tokens = torch.arange(9)[None]
    plain, deeper = AutoModelForCausalLM.from_pretrained(plain_dir), ZttForCausalLM.from_pretrained(out)
    torch.testing.assert_close(deeper(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-6)
    assert (deeper.input_injection is not None) == (deeper.cycle_scales is not None) == bool(words)
    assert (out / "tokenizer.json").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["ztt"]


def test_compress_and_back(plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, back = str(tmp_path / "small"), str(tmp_path / "back")
    assert main(["convert", str(plain_dir), "--output", small, "--mode", "compress", "--ztt.zero-tokens", "false"]) == 0
    assert main(["convert", small, "--output", back, "--mode", "to-base", "--unroll"]) == 0
    tokens = torch.arange(9)[None]
    logits = [c.from_pretrained(p)(tokens).logits for c, p in ((ZttForCausalLM, small), (AutoModelForCausalLM, back))]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    assert "4 layers deep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cycles", "0"], "cycles=0"),
        (["--head-layers", "9"], "head_layers=9"),
        (["--mode", "compress", "--cycles", "5"], "cannot be compressed"),
        (["--mode", "compres"], "'mode' must be one of"),
        (["--ztt.zero-rop", "none"], "did you mean 'zero_rope'"),
        (["--unroll"], "--unroll belongs to --mode to-base"),
        (["--mode", "to-base"], "is a plain llama model"),
    ],
)
def test_bad_input_writes_nothing(
    words: list[str], message: str, plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(plain_dir), "--output", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_left_alone(plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "anything", "--output", str(plain_dir)]) == 2
    assert "exists already" in capsys.readouterr().err
