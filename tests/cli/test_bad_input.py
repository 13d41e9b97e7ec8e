"""Bad input to whole commands: one sentence that names it, exit code 2, and nothing half-written.

What belongs to one command alone (its flags, its files) is tested beside that command.
"""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.saved import tiny_llama
from zerodraft.cli.main import main
from zerodraft.drafters.block_model import drafter_from_target

SHORT = ["--max-new-tokens", "5"]
DISTILL = [*SHORT, "--no-chat", "--batch-size", "2"]


def refuses(capsys: pytest.CaptureFixture[str], message: str, *words: str | Path) -> None:
    """Run a command that must end with this message."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    # before it there may be news of what was done
    assert err.rstrip("\n").split("\n")[-1].startswith("zerodraft: ")


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def block_drafter(to: Path, tokenizer: Any, **sizes: Any) -> Path:
    """A drafter for a target like `plain_dir`, of other sizes if wanted."""
    config = tiny_llama(tokenizer)
    config.update(sizes)
    torch.manual_seed(0)
    drafter_from_target(LlamaForCausalLM(config), num_layers=1, block_size=3).save_pretrained(to)
    return to


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nthe fox sat\non the mat\n", encoding="utf-8")
    return file


@pytest.fixture
def overflowing(plain_dir: Path, tmp_path: Path) -> Path:
    """A target with finite weights whose logits are no numbers."""
    folder = copy(plain_dir, tmp_path / "overflowing")
    model = LlamaForCausalLM.from_pretrained(plain_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "size"), [("hidden_size", 64), ("vocab_size", 411), ("num_hidden_layers", 5)])
def test_a_drafter_for_a_target_of_another_size(
    name: str, size: int, plain_dir: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter = block_drafter(tmp_path / "drafter", tokenizer, **{name: size})
    refuses(capsys, f"with {name}={size}, this", "generate", "hi", "--target", plain_dir, "--drafter", drafter, *SHORT)
    if name == "hidden_size":
        data = tmp_path / "completions"
        data.mkdir()
        (data / "a.bin").write_bytes(bytes(2 * 12))
        (data / "a.jsonl").write_text(json.dumps({"n": 12, "p": 4, "temp": 0.0}) + "\n")
        words = ("--target", plain_dir, "--data", data, "--plot", tmp_path / "plot.png")
        refuses(capsys, f"with {name}={size}, this", "eval-drafter", drafter, *words)
        assert not (tmp_path / "plot.png").exists()


def test_a_damaged_drafter(plain_dir: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    drafter = block_drafter(tmp_path / "drafter", tokenizer)
    assert main(["generate", "hi", "--target", str(plain_dir), "--drafter", str(drafter), *SHORT]) == 0
    weights = drafter / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses(capsys, "could not be loaded", "generate", "hi", "--target", plain_dir, "--drafter", drafter, *SHORT)


def test_a_damaged_target(plain_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, out = copy(plain_dir, tmp_path / "target"), tmp_path / "out"
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses(capsys, "could not be loaded", "generate", "hi", "--target", target, *SHORT)
    refuses(capsys, "could not be loaded", "distill", "--target", target, "--prompts", prompts, "--out", out, *DISTILL)
    assert not out.exists()


def test_weights_that_are_no_safetensors(plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = copy(plain_dir, tmp_path / "target")
    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(b"no weights")
    refuses(capsys, "pickled weights are damaged", "generate", "hi", "--target", target, *SHORT)
    torch.save(LlamaForCausalLM.from_pretrained(plain_dir).state_dict(), target / "pytorch_model.bin")
    assert main(["generate", "hi", "--target", str(target), *SHORT]) == 0


def test_code_beside_the_weights_is_not_run(
    plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, mark = copy(plain_dir, tmp_path / "target"), tmp_path / "was run"
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (target / "config.json").write_text(json.dumps(config))
    (target / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    refuses(capsys, "could not be loaded", "generate", "hi", "--target", target, *SHORT)
    assert not mark.exists()


def test_logits_that_are_no_numbers(
    overflowing: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "hold NaN or infinity"
    for more in ([], ["--temperature", "1"], ["--compare"]):
        refuses(capsys, message, "generate", "the cat", "--target", overflowing, *SHORT, *more)
    for name, greedy in (("greedy", "1"), ("sampled", "0")):
        words = ["--target", overflowing, "--prompts", prompts, "--out", tmp_path / name, "--greedy", greedy]
        refuses(capsys, message, "distill", *words, *DISTILL)
        # the manifest says that it is not finished
        assert [path.name for path in (tmp_path / name).iterdir() if path.name[0] != "."] == ["manifest.json"]
        assert json.loads((tmp_path / name / "manifest.json").read_text())["finished"] is False


def test_prompts_that_do_not_fit(
    plain_dir: Path, ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, out = tmp_path / "long.txt", tmp_path / "out"
    long.write_text("the cat " * 1500, encoding="utf-8")
    message = "the model reads at most 2048"
    refuses(capsys, message, "generate", "--prompt-file", long, "--target", plain_dir, *SHORT)
    refuses(capsys, message, "generate", "--prompt-file", long, "--model", ztt_dir, *SHORT)
    words = ["--target", plain_dir, "--prompts", long, "--out", out]
    refuses(capsys, "None of the 1 prompts fits", "distill", *words, *DISTILL)
    assert not out.exists()


def test_a_disk_that_is_full_while_distilling(
    plain_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prompts.write_text("".join(f"the cat sat {n}\n" for n in range(20)), encoding="utf-8")
    words: list[str | Path] = ["distill", "--target", plain_dir, "--prompts", prompts, "--out", out, "--no-chat"]
    words += ["--max-new-tokens", "60", "--greedy", "1"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel lets no file grow beyond this, as a full disk would; the manifest is smaller, a batch is not
    resource.setrlimit(resource.RLIMIT_FSIZE, (2200, hard))
    try:
        refuses(capsys, "could not be written", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json"]
    assert main([str(word) for word in words]) == 0
    assert json.loads((out / "manifest.json").read_text())["finished"] is True


def test_a_table_that_is_not_there(plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "none.ngram"
    refuses(capsys, "none.ngram", "generate", "hi", "--target", plain_dir, "--ngram", table, *SHORT)


def test_settings_of_distill_are_flags_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "--target", "smollm2", "--out", tmp_path / "out", "--invent", "3"]
    for flag, value, message in (
        ("--greedy", "2", "--greedy is 2.0; it is a share between 0 and 1"),
        ("--greedy", "much", "'greedy' must be a number, got 'much'"),
        ("--temperatures", "0", "--temperatures is (0.0,)"),
        ("--batch-sise", "3", "did you mean '--batch-size'?"),
        ("--settings.greedy", "1", "unknown flag '--settings.greedy'"),
    ):
        refuses(capsys, message, *words, flag, value)
    assert not (tmp_path / "out").exists()
