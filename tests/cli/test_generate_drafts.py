"""`zerodraft generate --target`: the same text as plain decoding, what is reported, and bad input."""

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zerodraft.cli import decoding
from zerodraft.cli.decoding import load_target
from zerodraft.cli.main import main
from zerodraft.generate.comparing import first_difference, near_tie, top_gap
from zerodraft.generate.names import SHIPPED, shipped_drafter


def generate(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["generate", *words, "--max-new-tokens", "12"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = generate(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out.rstrip("\n").split("\n")[-1])


@pytest.fixture(scope="module")
def plain_text(plain_dir: Path, tokenizer: Any) -> str:
    prompt = tokenizer("the cat", return_tensors="pt")
    out = AutoModelForCausalLM.from_pretrained(plain_dir).generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("drafter", ["lookup", "lookup:2", "itself", ""])
def test_the_text_is_that_of_plain_decoding(
    drafter: str, plain_dir: Path, plain_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--drafter", str(plain_dir) if drafter == "itself" else drafter] if drafter else []
    found = result(capsys, "the cat", "--target", str(plain_dir), *words, "--compare")
    assert found["text"] == plain_text
    assert found["equal"] is True
    assert found["new_tokens"] == 12
    assert found["speedup"] > 0
    assert found["tokens_per_second"] > 0
    assert found["stats"]["new_tokens"] == 12


def test_a_zero_token_transformer_is_a_target_too(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "the cat", "--target", str(ztt_dir), "--drafter", "lookup", "--compare")
    assert found["equal"] is True


def test_people_read_the_text_as_it_comes_and_the_comparison(
    plain_dir: Path, plain_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = generate(capsys, "the cat", "--target", str(plain_dir), "--drafter", "lookup", "--compare")
    assert code == 0
    assert out.startswith(f"{plain_text}\n12 tokens, ")
    assert "drafts by lookup" in out
    assert "the same tokens" in out


def test_the_trace_holds_the_text_and_a_legend(
    plain_dir: Path, plain_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = generate(capsys, "the cat", "--target", str(plain_dir), "--drafter", str(plain_dir), "--trace")
    assert code == 0
    traced, legend = out.split("\n{+accepted+} ")
    for mark in ("{+", "+}"):
        traced = traced.replace(mark, "")
    assert re.sub(r"\[-.*?-\]", "", traced, flags=re.DOTALL) == plain_text
    assert "[-rejected-] " in legend


def test_a_sampled_text_follows_the_seed_and_is_not_compared_token_by_token(
    plain_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["the cat", "--target", str(plain_dir), "--temperature", "1.5", "--seed"]
    texts = [result(capsys, *words, seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    found = result(capsys, *words, "1", "--compare")
    assert found["equal"] is None
    assert found["speedup"] > 0


def test_a_difference_is_told_with_its_place_and_the_gap(
    plain_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = decoding.write

    def tampered(model: Any, inputs: Any, sampling: Any, tokenizer: Any, decode: Any = None, *others: Any) -> Any:
        written = write(model, inputs, sampling, tokenizer, decode, *others)
        if decode is not None and len(written.tokens) > 5:
            written.tokens[5] += 1
        return written

    monkeypatch.setattr(decoding, "write", tampered)
    words = ["the cat", "--target", str(plain_dir), "--drafter", "lookup", "--compare"]
    found = result(capsys, *words)
    assert found["equal"] is False
    assert found["first_difference"] == 5
    assert found["top_gap"] > 0
    _, out, _ = generate(capsys, *words)
    assert "other tokens from the 6th on" in out


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_type_that_the_target_computes_in(dtype: Any, plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_target(str(plain_dir), dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    found = result(capsys, "the cat", "--target", str(plain_dir), "--drafter", "lookup", "--dtype", dtype)
    assert found["new_tokens"] == 12


def test_what_rounding_can_explain_depends_on_the_type() -> None:
    assert near_tie(torch.float32) == 1e-3
    assert near_tie(torch.bfloat16) == 4 * 0.125  # 0.125 is the next number's distance from 16
    assert near_tie(torch.float16) == 4 * 2**-6


def test_where_lists_differ() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2


def test_the_gap_between_the_two_best_logits(plain_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].sort(descending=True).values
    assert top_gap(model, {"input_ids": ids[:, :2]}, [7, 8]) == pytest.approx(float(best[0] - best[1]), abs=1e-6)


def test_the_shipped_drafter_is_found_by_its_targets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_drafter("some/model") is None
    folder = tmp_path / "models" / SHIPPED["smollm2"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("ZERODRAFT_CACHE", str(tmp_path / "cache"))
    cached = str(tmp_path / "cache" / "smollm2")
    for name in ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", cached, "cache/smollm2"):
        assert shipped_drafter(name) == folder


def test_a_prompt_file_of_another_encoding(plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_bytes("für Elise".encode("latin-1"))
    code, _, err = generate(capsys, "--prompt-file", str(tmp_path / "prompt.txt"), "--target", str(plain_dir))
    assert code == 2
    assert "is not UTF-8 text" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hi"], "give the model with either --model or --target"),
        (["hi", "--target", "T", "--model", "T"], "give the model with either --model or --target"),
        (["hi", "--target", "T", "--show-depth"], "--show-depth belongs to --model"),
        (["hi", "--target", "T", "--exit-rule", "cycles:1"], "--exit-rule belongs to --model"),
        (
            ["hi", "--model", "T", "--compare", "--show-depth"],
            "--compare is for decoding with drafts, --show-depth",
        ),
        (["hi", "--target", "T", "--drafter", "lookup:0"], "such as lookup:3"),
        (
            ["hi", "--target", "T", "--drafter", "lokup"],
            "The drafter is neither lookup, lookup:N, self, self:C nor a model",
        ),
        (["hi", "--target", "nobody", "--ngram", "nowhere.ngram"], "nowhere.ngram"),
        (["hi", "--target", "T", "--chat"], "no chat template"),
        (["the cat " * 1500, "--target", "T"], "the model reads at most 2048"),
        (["", "--target", "T"], "the prompt is empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], message: str, plain_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = generate(capsys, *(str(plain_dir) if word == "T" else word for word in words))
    assert code == 2, out
    assert message in err
    assert err.count("\n") == 1


def test_a_drafter_with_another_vocabulary_is_refused(
    plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=5077)).save_pretrained(tmp_path / "other")
    code, _, err = generate(capsys, "hi", "--target", str(plain_dir), "--drafter", str(tmp_path / "other"))
    assert code == 2
    assert "The drafter's vocabulary has 5077 tokens" in err


SETTINGS = {
    "stop": (["--stop", "fox", "--stop", "the"], {"stop_strings": ["fox", "the"]}),
    "repetition": (["--repetition-penalty", "1.7"], {"repetition_penalty": 1.7}),
    "top k": (
        ["--temperature", "1", "--top-k", "2"],
        {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 2},
    ),
    "min p": (
        ["--temperature", "2", "--top-k", "0", "--min-p", "0.5"],
        {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 0, "min_p": 0.5},
    ),
}


@pytest.mark.parametrize("form", ["--target", "--model"])
@pytest.mark.parametrize("name", SETTINGS)
def test_flags_mean_what_generate_means_by_them(
    name: str, form: str, plain_dir: Path, ztt_dir: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words, options = SETTINGS[name]
    path = plain_dir if form == "--target" else ztt_dir
    found = result(capsys, "the cat", form, str(path), *words, *(["--drafter", "lookup"] if form == "--target" else []))
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer("the cat", return_tensors="pt")
    torch.manual_seed(0)
    plain = model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, **options}, tokenizer=tokenizer)
    assert found["text"] == tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "-1"], "--top-k is -1"),
        (["--min-p", "1.5"], "--min-p is 1.5"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0"),
        (["--stop", ""], "--stop is an empty text"),
    ],
)
def test_settings_that_make_no_sense(
    words: list[str], message: str, plain_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = generate(capsys, "hi", "--target", str(plain_dir), *words)
    assert code == 2
    assert message in err


def test_transformers_our_engine_and_drafts_are_told_apart(plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["the cat", "--target", str(plain_dir), "--drafter", "lookup", "--compare"]
    found = result(capsys, *words)
    speed = found["tokens_per_second"]
    assert found["speedup"] == pytest.approx(speed / found["plain_tokens_per_second"])
    assert found["speedup_over_own_plain"] == pytest.approx(speed / found["own_plain_tokens_per_second"])
    _, out, _ = generate(capsys, *words)
    for part in ("transformers, plain decoding: ", "our plain decoding, no drafts: ", "with drafts: "):
        assert part in out


def test_a_prompt_comes_through_a_pipe(plain_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = result(capsys, "the cat", "--target", str(plain_dir), "--drafter", "lookup")["text"]
    reading, writing = os.pipe()
    os.write(writing, b"the cat")
    os.close(writing)
    try:
        words = ["--prompt-file", f"/dev/fd/{reading}", "--target", str(plain_dir), "--drafter", "lookup"]
        assert result(capsys, *words)["text"] == expected
    finally:
        os.close(reading)


@pytest.mark.parametrize("words", [["-"], ["--prompt-file", "-"]])
@pytest.mark.parametrize("typed", [b"the cat", b"the cat\n", b"\xef\xbb\xbfthe cat\r\n"])
def test_a_dash_is_standard_input(
    words: list[str], typed: bytes, plain_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = result(capsys, "the cat", "--target", str(plain_dir), "--drafter", "lookup")["text"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="ascii"))
    assert result(capsys, *words, "--target", str(plain_dir), "--drafter", "lookup")["text"] == expected


@pytest.mark.parametrize(
    ("typed", "message"),
    [(b"", "the prompt is empty"), (b"f\xfcr", "Standard input is not UTF-8"), (None, "standard input is closed")],
)
def test_standard_input_that_is_no_prompt(
    typed: bytes | None,
    message: str,
    plain_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stdin = None if typed is None else io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    code, _, err = generate(capsys, "-", "--target", str(plain_dir))
    assert (code, message in err) == (2, True)


@pytest.mark.parametrize("kind", ["plain", "ztt"])
def test_a_tokenizer_without_an_end_of_text_can_write(
    kind: str, plain_dir: Path, ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(plain_dir if kind == "plain" else ztt_dir, tmp_path / "model")
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(
            re.sub(r'"eos_token(_id)?": [^,\n}]+', r'"eos_token\1": null', text), encoding="utf-8"
        )
    assert load_target(str(folder))[1].eos_token_id is None
    assert result(capsys, "the cat", "--model", str(folder))["new_tokens"] == 12
    requests, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    requests.write_text('{"prompt": "the cat"}\n{"prompt": "a"}\n', encoding="utf-8")
    words = ["--model", str(folder), "--prompt-file", str(requests), "--out", str(out), "--batch", "2"]
    assert result(capsys, *words)["answered"] == 2
