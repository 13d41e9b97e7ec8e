"""`train-drafter --kind masked` and what decodes with the result, and with a checkpoint of the hub's kind."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.drafters.masked_hub import DREAM, dream_tensors, write
from tests.saved import TEXT
from zerodraft.cli.main import main
from zerodraft.drafters.kinds import Denoising
from zerodraft.drafters.masked import MaskedDrafter
from zerodraft.drafters.retokenized import RetokenizedDrafter
from zerodraft.generate.drafters import find_drafter


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


def test_checkpoints_of_the_hub(plain_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "dream", DREAM, dream_tensors())
    target = AutoModelForCausalLM.from_pretrained(plain_dir)
    target.resize_token_embeddings(70)
    drafter, name = find_drafter(str(folder), target, str(plain_dir), Denoising(steps=3, prefix_cache=False))
    assert isinstance(drafter, MaskedDrafter)
    assert (name, drafter.vocab_size) == ("dream", 70)
    assert (drafter.steps, drafter.prefix_cache) == (3, False)
    assert f"no tokenizer could be loaded from '{folder}'" in caplog.text


def test_a_checkpoint_with_another_tokenizer_drafts_through_the_text(
    plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "dream", DREAM, dream_tensors())
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]  # stub
    words.decoder = decoders.Metaspace(prepend_scheme="always")  # type: ignore[assignment]  # stub
    words.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=58, special_tokens=["</s>"]))  # type: ignore[call-arg]  # stub
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(plain_dir)
    drafter, _ = find_drafter(str(folder), target, str(plain_dir))
    assert isinstance(drafter, RetokenizedDrafter)
    assert isinstance(drafter.drafter, MaskedDrafter)
    assert drafter.drafter.vocab_size == DREAM["vocab_size"]
    start = f"generate --target {plain_dir} --drafter {folder} --drafter-steps 2 --no-prefix-cache"
    assert main([*start.split(), "--max-new-tokens", "12", "--compare", "--json", "the cat"]) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert result["equal"]
    assert result["stats"]["drafted"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--drafter-steps 2",
            "2 denoising steps are for drafters that are masked diffusion models, and 'lookup'",
        ),
        ("--no-prefix-cache", "doing without a prefix cache is for drafters that are masked diffusion models"),
        ("--drafter-steps 0", "--drafter-steps is 0; it must be at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["generate hello", "chat", "bench decode"])
def test_other_drafters_have_no_steps(
    command: str, flags: str, message: str, plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("hello\n")
    more = f" --prompts {tmp_path / 'prompts.txt'} --limit 0" if command.startswith("bench") else ""
    assert main(f"{command} --target {plain_dir} --drafter lookup {flags}{more}".split()) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_settings_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = f"train-drafter --target x --data y --out {tmp_path / 'z'}"
    for words, key in (
        ("--kind masked --drafter.layers 3", "drafter"),
        ("--masked.layers 3", "masked"),
        ("--kind masked --autoregressive.layers 3", "autoregressive"),
        ("--kind autoregressive --masked.layers 3", "masked"),
    ):
        assert main(f"{start} {words}".split()) == 2
        assert f"unknown key '{key}'" in capsys.readouterr().err.replace("\n", " ")
    assert main(f"{start} --kind masked --masked.layer 3".split()) == 2
    assert "did you mean" in capsys.readouterr().err.replace("\n", " ")
