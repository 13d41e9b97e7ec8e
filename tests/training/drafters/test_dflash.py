"""Training a DFlash drafter: a whole run with resume, what it measures, and the commands around it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError
from zerodraft.drafters.block_model import drafter_from_target
from zerodraft.drafters.dflash import DFlashDrafter
from zerodraft.drafters.dflash_files import load_dflash
from zerodraft.generate.huggingface import DiffuSpec
from zerodraft.training.drafters.completions import read_completions
from zerodraft.training.drafters.dflash import train_dflash, unused_token
from zerodraft.training.drafters.dflash_recipe import DFlashRecipe
from zerodraft.training.recipe import read_recipe

VOCABULARY = 64
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path_factory.mktemp("target"))
    return model


@pytest.fixture(scope="module")
def folder(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target's files and greedy completions of its own, without the last token."""
    folder = tmp_path_factory.mktemp("work")
    target.save_pretrained(folder / "target")
    torch.manual_seed(1)
    rows = target.generate(torch.randint(60, (16, 4)), max_new_tokens=30, suppress_tokens=[63], **GREEDY)
    (folder / "data").mkdir()
    (folder / "data" / "a.bin").write_bytes(rows.numpy().astype("<u2").tobytes())
    line = json.dumps({"n": rows.shape[1], "p": 4, "temp": 0.0, "src": "test"}) + "\n"
    (folder / "data" / "a.jsonl").write_text(line * len(rows))
    return folder


def recipe(folder: Path, out: str, **more: Any) -> Any:
    settings = {
        "target": str(folder / "target"), "data": [str(folder / "data")], "out": str(folder / out),
        "drafter.layers": 2, "drafter.block_size": 3, "drafter.taps": 2, "loss.anchors": 6,
        "held_back.sequences": 3, "held_back.measured": 2, "training.steps": 6, "training.eval_every": 3,
        "training.save_every": 3, "training.learning_rate": 3e-3, "cache": str(folder / "features"),
    }  # fmt: skip
    return read_recipe(DFlashRecipe, None, settings | more)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    results = train_dflash(recipe(folder, "run"), callbacks=[])
    assert results["steps"] == 6
    assert len(results["held_back"]["by_position"]) == 3
    return folder / "run" / "model"


def test_resumed_is_uninterrupted(folder: Path, trained: Path) -> None:
    train_dflash(recipe(folder, "halves", **{"training.steps": 3}), callbacks=[])
    train_dflash(recipe(folder, "halves"), resume=True, callbacks=[])
    ours, theirs = load_dflash(trained).state_dict(), load_dflash(folder / "halves" / "model").state_dict()
    start = load_dflash(folder / "run" / "checkpoint-3").state_dict()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-6)
    assert any(not torch.equal(value, start[name]) for name, value in ours.items())


def test_longer_training_accepts_more(folder: Path, trained: Path) -> None:
    """On the target's own completions, which it learns by heart."""
    more = {"drafter.start": str(trained), "training.steps": 40, "held_back.sequences": 1, "training.eval_every": 40}
    results = train_dflash(recipe(folder, "long", **more), callbacks=[])
    log = [json.loads(line) for line in (folder / "long" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert results["held_back"]["mat"] >= 1


def test_exported_drafter_serves_transformers(target: LlamaForCausalLM, trained: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "exported"
    assert main(["export-drafter", str(trained), str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["block_size"], said["mask_token_id"], said["target_layer_ids"]) == (4, 63, [0, 2])
    prompt = torch.tensor([[5, 9, 2]])
    plain = target.generate(prompt, max_new_tokens=20, **GREEDY)
    assistant = AutoModel.from_pretrained(out, dtype=torch.float32)
    how = GREEDY | {"max_new_tokens": 20, "assistant_model": assistant, "speculation_type": "dflash"}
    assert torch.equal(target.generate(prompt, **how), plain)
    for path in (trained, out):
        spec = DiffuSpec(DFlashDrafter.from_pretrained(path, target))
        assert torch.equal(target.generate(prompt, max_new_tokens=20, custom_generate=spec, **GREEDY), plain)
    assert main(["export-drafter", str(out), str(tmp_path / "z"), "--layout", "z-lab"]) == 0
    assert json.loads((tmp_path / "z" / "config.json").read_text())["architectures"] == ["DFlashDraftModel"]


def test_commands_train_and_judge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"--target {folder / 'target'} --data {folder / 'data'}"
    words = f"train-drafter --kind dflash {where} --out {folder / 'cli'} --cache {folder / 'cli-features'}"
    more = "--drafter.layers 1 --drafter.block-size 3 --held-back.sequences 3 --training.steps 2"
    settings = folder / "settings.yaml"
    settings.write_text("drafter: {taps: 1, mask_token: 62}\n")
    assert main(f"{words} {more} --recipe {settings}".split()) == 0
    assert load_dflash(folder / "cli" / "model").config.mask_token_id == 62
    assert main(f"{words} --drafter.draft-vocab 9".split()) == 2
    assert "draft_vocab" in capsys.readouterr().err
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder / "target")
    assert main(f"eval-drafter {folder / 'cli' / 'model'} {where} --limit 3 --json".split()) == 0
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1])["completions"] == 3


def test_only_dflash_drafters_are_exported(target: LlamaForCausalLM, folder: Path, tmp_path: Path, capsys) -> None:
    drafter_from_target(target, num_layers=1).save_pretrained(tmp_path / "block")
    for path, why in ((tmp_path / "block", "zerodraft_block_drafter model"), (folder / "target", "is a llama model")):
        assert main(["export-drafter", str(path), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert why in error
        assert "--kind dflash" in error
    assert not (tmp_path / "out").exists()


def test_masks_are_a_token_that_no_text_holds(folder: Path) -> None:
    completions = read_completions([folder / "data"])
    assert unused_token(completions, VOCABULARY) == 63


def test_settings_of_other_drafters_are_refused(folder: Path) -> None:
    with pytest.raises(ZerodraftError, match="draft_vocab"):
        recipe(folder, "x", **{"drafter.draft_vocab": 32})
    with pytest.raises(ZerodraftError, match="mask_token is 64"):
        train_dflash(recipe(folder, "y", **{"drafter.mask_token": 64}), callbacks=[])
