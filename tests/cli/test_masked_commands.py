"""`train-drafter --kind masked` and what decodes with the result, and with a checkpoint of the hub's kind."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.drafters.masked_hub import DREAM, dream_tensors, write
from zerodraft.cli.decoding import load_drafter
from zerodraft.cli.main import main
from zerodraft.drafters.masked import MaskedDrafter


@pytest.fixture(scope="module")
def completions(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completions")
    model = AutoModelForCausalLM.from_pretrained(plain_dir)
    prompts = torch.randint(model.config.vocab_size, (10, 4), generator=torch.Generator().manual_seed(0))
    ids = model.generate(prompts, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    (folder / "a.bin").write_bytes(ids.numpy().astype("<u2").tobytes())
    (folder / "a.jsonl").write_text(10 * (json.dumps({"n": ids.shape[1], "p": 4, "temp": 0.0}) + "\n"))
    return folder


def test_train_and_decode(
    plain_dir: Path, completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masked"
    words = f"train-drafter --kind masked --target {plain_dir} --data {completions} --out {out} --masked.layers 2"
    words += " --masked.block-size 3 --held-back.sequences 2 --training.steps 2 --training.warmup-steps 1"
    assert main(words.split()) == 0
    said = capsys.readouterr()
    assert "tokens per target pass on 2 held-back completions" in " ".join((said.out + said.err).split())
    results = json.loads((out / "results.json").read_text())
    assert len(results["held_back"]["by_position"]) == 3
    assert results["recipe"]["training"]["learning_rate"] == 3e-4

    words = f"generate --target {plain_dir} --drafter {out / 'model'} --max-new-tokens 8 --compare --json hello"
    assert main(words.split()) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert result["equal"]


def test_checkpoints_of_the_hub(plain_dir: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "dream", DREAM, dream_tensors())
    target = AutoModelForCausalLM.from_pretrained(plain_dir)
    target.resize_token_embeddings(70)
    drafter, name = load_drafter(str(folder), target, "tiny")
    assert isinstance(drafter, MaskedDrafter)
    assert (name, drafter.vocab_size) == ("dream", 70)


def test_settings_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = f"train-drafter --target x --data y --out {tmp_path / 'z'}"
    for words, key in (("--kind masked --drafter.layers 3", "drafter"), ("--masked.layers 3", "masked")):
        assert main(f"{start} {words}".split()) == 2
        assert f"unknown key '{key}'" in capsys.readouterr().err.replace("\n", " ")
    assert main(f"{start} --kind masked --masked.layer 3".split()) == 2
    assert "did you mean" in capsys.readouterr().err.replace("\n", " ")
