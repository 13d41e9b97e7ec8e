"""`zerodraft generate`: what it prints and reports, and one sentence for each kind of bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from zerodraft import FixedExit, ZttForCausalLM, exit_rule_to_dict
from zerodraft.cli.depth import colour, legend
from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError
from zerodraft.models.tokenizers import load_tokenizer
from zerodraft.ztt.exits import ConfidenceExit, LatentExit, ZeroMassExit
from zerodraft.ztt.rules import parse_exit_rule


def generate(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["generate", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = generate(capsys, *words, "--json", "--max-new-tokens", "6")
    assert code == 0, err
    return json.loads(out.rstrip("\n").split("\n")[-1])


def test_json_tells_text_speed_and_depths(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "the cat", "--model", str(ztt_dir))
    assert found["new_tokens"] == 6
    assert found["depths"] == [3] * 6
    assert found["mean_depth"] == 3
    assert found["tokens_per_second"] > 0


def test_greedy_text_is_that_of_transformers(ztt_dir: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tokenizer("the cat", return_tensors="pt")
    expected = ZttForCausalLM.from_pretrained(ztt_dir).generate(**prompt, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert result(capsys, "the cat", "--model", str(ztt_dir))["text"] == text
    code, out, _ = generate(capsys, "the cat", "--model", str(ztt_dir), "--max-new-tokens", "6")
    assert code == 0
    assert out.startswith(text)


def test_an_exit_rule_sets_the_depth_of_each_token(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert result(capsys, "the cat", "--model", str(ztt_dir), "--exit-rule", "cycles:2")["depths"] == [2] * 6


def test_show_depth_ends_with_a_legend(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["the cat", "--model", str(ztt_dir), "--exit-rule", "cycles:1", "--show-depth", "--max-new-tokens", "4"]
    code, out, _ = generate(capsys, *words)
    assert code == 0
    assert "■ 1 4 (100%)" in out
    assert "1.00 of 3 cycles a token" in out


def test_the_seed_decides_what_is_sampled(ztt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["the cat", "--model", str(ztt_dir), "--temperature", "1.5", "--seed"]
    texts = [result(capsys, *words, seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_the_calibrated_rule_comes_from_the_config(
    ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(ztt_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["exit_rule"] = exit_rule_to_dict(FixedExit(cycles=1))
    (model / "config.json").write_text(json.dumps(config))
    assert result(capsys, "the cat", "--model", str(model), "--exit-rule", "calibrated")["depths"] == [1] * 6


def test_a_prompt_file_is_read(ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("the cat", encoding="utf-8")
    from_file = result(capsys, "--prompt-file", str(file), "--model", str(ztt_dir))
    assert from_file["text"] == result(capsys, "the cat", "--model", str(ztt_dir))["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the prompt is empty"),
        (["  "], "the prompt is empty"),
        (["hi", "--prompt-file", "x"], "not both"),
        (["--prompt-file", "nowhere.txt"], "no prompt file at 'nowhere.txt'"),
        (["hi", "--max-new-tokens", "0"], "it must be at least 1"),
        (["hi", "--temperature", "-1"], "it must be 0 (greedy) or from 0.0001 up"),
        (["hi", "--temperature", ".nan"], "--temperature is nan; it must be 0 (greedy)"),
        (["hi", "--temperature", ".inf"], "--temperature is inf; it must be 0 (greedy)"),
        (["hi", "--temperature", "1e-40"], "--temperature is 1e-40; it must be 0 (greedy)"),
        (["hi", "--top-p", "1.5"], "it must be above 0 and at most 1"),
        (["hi", "--exit-rule", "zero-mas:0.5"], "unknown exit rule 'zero-mas' (did you mean 'zero-mass'?)"),
        (["hi", "--exit-rule", "calibrated"], "no calibrated exit rule"),
        (["hi", "--exit-rule", "calibrated:3"], "'calibrated' takes none"),
        (["hi", "--exit-rule", "latent:nan,0.5"], "neither a number nor one number for each cycle"),
        (["hi", "--chat"], "no chat template"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], message: str, ztt_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = generate(capsys, *words, "--model", str(ztt_dir))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_of_a_tokenizer_with_too_many_tokens_only_these_are_refused(
    ztt_dir: Path, plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, source in (("--model", ztt_dir), ("--target", plain_dir)):
        model = shutil.copytree(source, tmp_path / flag)
        larger = load_tokenizer(model)
        larger.add_tokens([f"<new{i}>" for i in range(3)])
        larger.save_pretrained(model)
        assert generate(capsys, "hi", flag, str(model), "--max-new-tokens", "2")[0] == 0
        code, _, err = generate(capsys, "hi <new1>", flag, str(model))
        assert code == 2
        assert f"the prompt holds token {len(larger) - 2}, but the model's vocabulary has" in err


def test_inputs_of_a_tokenizer_that_a_decoder_does_not_know(
    ztt_dir: Path, plain_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, source in (("--model", ztt_dir), ("--target", plain_dir)):
        model = shutil.copytree(source, tmp_path / flag)
        tokenizer = load_tokenizer(model)
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(model)
        for more in ([], ["--chat"]):
            assert generate(capsys, "hi", flag, str(model), "--max-new-tokens", "2", *more)[0] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"nothing"), "could not be loaded"),
        (lambda path: (path / "config.json").write_text("{}"), "is not a model configuration"),
        (lambda path: (path / "tokenizer.json").unlink(), "could not be loaded: Couldn't instantiate"),
    ],
)
def test_a_damaged_model_is_one_sentence(
    damage: Any, message: str, ztt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(ztt_dir, tmp_path / "model")
    damage(model)
    code, _, err = generate(capsys, "hi", "--model", str(model))
    assert code == 2, err
    assert message in err


def test_a_plain_model_is_decoded_with_drafts_whatever_the_flag_is_called(
    plain_dir: Path, ztt_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (plain_dir, ztt_dir):
        texts = []
        for flags in (["--target", str(model)], ["--model", str(model), "--drafter", "lookup"]):
            code, out, _ = generate(capsys, "hi", *flags, "--max-new-tokens", "4", "--json")
            assert code == 0
            assert json.loads(out)["drafter"] == "lookup"
            texts.append(json.loads(out)["text"])
        assert texts[0] == texts[1]
    assert "drafts by lookup" in generate(capsys, "hi", "--model", str(plain_dir), "--max-new-tokens", "4")[1]
    assert "cycles a token" in generate(capsys, "hi", "--model", str(ztt_dir), "--max-new-tokens", "4")[1]
    code, _, err = generate(capsys, "hi", "--model", str(plain_dir), "--show-depth")
    assert code == 2
    assert "convert it first with 'zerodraft convert" in err


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("off", None),
        ("zero-mass:0.5", ZeroMassExit(threshold=0.5)),
        ("confidence:1e-1", ConfidenceExit(threshold=0.1)),
        ("latent:0.3, never,5e-1", LatentExit(threshold=(0.3, None, 0.5))),
        ("cycles:2", FixedExit(cycles=2)),
    ],
)
def test_exit_rules_as_text(text: str, rule: object) -> None:
    assert parse_exit_rule(text, None) == rule


@pytest.mark.parametrize(
    "text",
    [
        "zero-mass",
        "zero-mass:",
        "zero-mass:much",
        "latent:never",
        "latent:0.1,",
        "cycles:1.5",
        "cycles:1,2",
        "off:1",
        "",
    ],
)
def test_malformed_exit_rules(text: str) -> None:
    with pytest.raises(ZerodraftError, match="exit rule"):
        parse_exit_rule(text, None)


def test_depths_have_colours_and_shares() -> None:
    assert colour(1) != colour(2)
    assert colour(99) == colour(100)
    assert legend([1, 1, 3]).plain == "cycles: ■ 1 2 (67%)  ■ 3 1 (33%)"
