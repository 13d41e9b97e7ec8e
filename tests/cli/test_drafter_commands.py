"""`train-drafter` and `eval-drafter` on a tiny target: one trains what the other measures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.saved import save_ztt
from zerodraft.cli.main import main


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("target")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def completions(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completions")
    model = LlamaForCausalLM.from_pretrained(target)
    prompts = torch.randint(64, (20, 4), generator=torch.Generator().manual_seed(0))
    ids = model.generate(prompts, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    (folder / "a.bin").write_bytes(ids.numpy().astype("<u2").tobytes())
    (folder / "a.jsonl").write_text(20 * (json.dumps({"n": ids.shape[1], "p": 4, "temp": 0.0}) + "\n"))
    return folder


@pytest.fixture(scope="module")
def drafter(target: Path, completions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "drafter"
    words = (
        f"train-drafter --target {target} --data {completions} --out {out} --drafter.layers 1 --drafter.block-size 3"
    )
    words += " --drafter.draft-vocab 0 --held-back.sequences 3 --training.steps 4 --training.warmup-steps 1"
    assert main(words.split()) == 0
    return out / "model"


def test_training_leaves_a_drafter_and_its_figures(drafter: Path) -> None:
    results = json.loads((drafter.parent / "results.json").read_text())
    assert results["steps"] == 4
    assert len(results["held_back"]["by_position"]) == 3
    assert results["command"]
    assert (drafter / "model.safetensors").is_file()


def test_the_folder_of_a_run_is_a_drafter(
    drafter: Path, target: Path, completions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/drafters.md."""
    words = f"generate --target {target} --drafter {drafter.parent} --max-new-tokens 8 --compare --json w3"
    assert main(words.split()) == 0
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1])["equal"]
    assert main(f"eval-drafter {drafter.parent} --target {target} --data {completions} --limit 2".split()) == 0
    assert "first choice's probability" in capsys.readouterr().out
    assert main(f"export-drafter {drafter.parent} {drafter.parent / 'exported'}".split()) == 2
    assert "a zerodraft_block_drafter model; export-drafter takes a dflash drafter" in capsys.readouterr().err


def test_completions_of_another_model(
    drafter: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.bin").write_bytes(np.full(20 * 20, 64, "<u2").tobytes())
    (foreign / "a.jsonl").write_text(20 * (json.dumps({"n": 20, "p": 4, "temp": 0.0}) + "\n"))
    train = f"train-drafter --target {target} --data {foreign} --out {tmp_path / 'out'} --held-back.sequences 3"
    for words in (
        f"eval-drafter {drafter} --target {target} --data {foreign}", train, f"{train} --drafter.start {drafter}"
    ):  # fmt: skip
        assert main(words.split()) == 2
        assert "hold token 64, the target's vocabulary has 64" in capsys.readouterr().err


def test_evaluation(
    drafter: Path, target: Path, completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "acceptance.png"
    words = f"eval-drafter {drafter} --target {target} --data {completions} --limit 5 --plot {plot} --json"
    assert main(words.split()) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert result["completions"] == 5
    assert 1 <= result["mat"] <= 4
    assert np.allclose(np.sum(result["ranks"], axis=1), 1)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_drafter_for_a_zero_token_transformer(
    completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    target, out = save_ztt(tmp_path / "ztt", tokenizer), tmp_path / "run"
    words = f"train-drafter --target {target} --data {completions} --out {out} --drafter.layers 2"
    words += " --drafter.block-size 3 --held-back.sequences 3 --training.steps 2 --training.warmup-steps 1"
    assert main(words.split()) == 0
    capsys.readouterr()
    words = f"generate --target {target} --drafter {out / 'model'} --max-new-tokens 8 --compare --json w3"
    assert main([*words.split()]) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert result["equal"]
    assert main(f"eval-drafter {out / 'model'} --target {target} --data {completions} --limit 2".split()) == 0


def test_bad_input(drafter: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (f"eval-drafter {drafter} --target {target} --data {tmp_path}", "holds no completions"),
        (f"train-drafter --target {target} --data {tmp_path} --out {tmp_path / 'out'}", "holds no completions"),
        (f"eval-drafter nosuch --target {target} --data {tmp_path}", "'nosuch' is not a model directory"),
        (f"eval-drafter {target} --target {target} --data {tmp_path}", "is a llama model; eval-drafter takes a block"),
        (f"train-drafter --target {target} --data x --out y --drafter.layer 3", "did you mean"),
    ):
        assert main(words.split()) == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
