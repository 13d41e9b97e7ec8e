"""Checkpoints in 16 bits: on CPUs the commands compute in float32, on the fast path, and write what that writes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.saved import save, save_ztt, tiny_llama
from zerodraft.cli import loading
from zerodraft.cli.decoding import load_target
from zerodraft.cli.loading import ready
from zerodraft.cli.main import main
from zerodraft.decoding.protocols import Target
from zerodraft.fast.compiled import kernels
from zerodraft.fast.lean import LeanTarget
from zerodraft.fast.packed import HalvesLinear
from zerodraft.models.loading import default_device

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A Llama stored in 16 bits, whose directory is named after them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(tokenizer)).to(getattr(torch, request.param))
    return save(model, tokenizer, tmp_path_factory.mktemp("halves") / request.param)


def test_generate_computes_in_float32_on_the_fast_path(
    stored: Path, tokenizer: Any, made: list[Target | None], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tokenizer("the cat", return_tensors="pt")
    model: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    plain = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    words = ["--target", str(stored), "--drafter", "lookup", "--max-new-tokens", "12", "--json"]
    assert main(["generate", *words, "the cat"]) == 0
    found = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert found["text"] == tokenizer.decode(plain, skip_special_tokens=True)
    assert made
    for target in made:
        assert isinstance(target, LeanTarget)
        halves = stored.name == "bfloat16" and kernels() is not None
        assert all(isinstance(layer.down, HalvesLinear) == halves for layer in target._weights.layers)


@torch.no_grad()
def test_no_weight_changes(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zerodraft"):
        model, _ = load_target(str(stored))
    assert model.dtype == torch.float32
    assert f"--dtype {stored.name}" in caplog.text
    before: Any = AutoModelForCausalLM.from_pretrained(stored, dtype="auto")
    assert str(before.dtype) == f"torch.{stored.name}"
    wanted = before.state_dict()
    assert all(torch.equal(weight, wanted[name].float()) for name, weight in model.state_dict().items())


def test_a_type_that_was_asked_for_stays(stored: Path) -> None:
    assert str(load_target(str(stored), stored.name)[0].dtype) == f"torch.{stored.name}"  # type: ignore[arg-type]  # one of them


def test_what_does_not_fit_into_memory_stays(
    stored: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "memory_bytes", lambda: 1000)
    assert str(load_target(str(stored))[0].dtype) == f"torch.{stored.name}"
    assert "--dtype float32 is exact" in caplog.text


def test_a_tied_head_stays_tied_and_float64_stays(tokenizer: Any) -> None:
    config = tiny_llama(tokenizer)
    config.tie_word_embeddings = True
    model = ready(LlamaForCausalLM(config).bfloat16())
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ready(model.double()).dtype == torch.float64


def test_a_zero_token_transformer_too(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_ztt(tmp_path / "ztt", tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    save(model, tokenizer, path)
    prompt = tokenizer("the cat", return_tensors="pt")
    plain = model.float().generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert main(["generate", "the cat", "--model", str(path), "--max-new-tokens", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert found["text"] == tokenizer.decode(plain, skip_special_tokens=True)


def test_a_conversion_keeps_the_type(tmp_path: Path, tokenizer: Any) -> None:
    path = save_ztt(tmp_path / "ztt", tokenizer, zero_tokens=False)
    save(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), tokenizer, path)
    assert main(["convert", str(path), "--mode", "to-base", "--unroll", "--output", str(tmp_path / "base")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").dtype == torch.bfloat16


def test_a_build_for_gpus_runs_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a build names its kind of accelerator whether there is one or not."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert default_device() == torch.device("cpu")
