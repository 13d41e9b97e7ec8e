"""`zerodraft info` agrees with the model that it describes."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from zerodraft import ZttForCausalLM
from zerodraft.cli.main import main


def test_json_agrees_with_the_loaded_model(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(ztt_dir), "--context", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = ZttForCausalLM.from_pretrained(ztt_dir)
    assert found["parameters"]["total"] == model.num_parameters()
    assert found["depth"] == model.config.num_hidden_layers == 8
    assert len(found["flops_per_token"]) == found["cycles"] == 3
    assert found["kv_bytes_per_token"] == 8 * 2 * 2 * 8 * 4


def test_people_read_a_line_for_each_part_and_each_cycle(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(ztt_dir)]) == 0
    out = capsys.readouterr().out
    assert "llama, 8 layers deep: 1 head + 3 x 2 shared + 1 tail, of which 4 are stored" in out
    assert all(word in out for word in ("embedding", "zero tokens", "total", "100.0%", "1,024 tokens of context"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "'nowhere' is not a model directory"),
        (["--context", "0", "nowhere"], "--context is 0; it must be at least 1"),
        ([], "MODEL is missing"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plain_model_has_sizes_too(plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(plain_dir)], ["--model", str(plain_dir)], [f"--target={plain_dir}"]):
        assert main(["info", *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["family"] == "llama"
        assert found["num_hidden_layers"] == 4
        model = LlamaForCausalLM.from_pretrained(plain_dir)
        assert found["parameters"]["total"] == model.num_parameters()
