"""The parts of `make demo` on a tiny model and a tiny text: they run, report what happened, and say what is missing."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import demo
from rich.console import Console
from transformers import LlamaForCausalLM

from tests.saved import save, save_ztt, tiny_llama, tiny_tokenizer
from zerodraft import ZeroMassExit, exit_rule_to_dict

LEFT_OUT = {"target": "none", "left_out": "no such model"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer and a calibrated exit rule."""
    rule = exit_rule_to_dict(ZeroMassExit(threshold=0.03))
    return save_ztt(tmp_path_factory.mktemp("demo") / "model", tiny_tokenizer(), exit_rule=rule)


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random plain model whose tokenizer has a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    return save(LlamaForCausalLM(tiny_llama(tokenizer)), tokenizer, tmp_path_factory.mktemp("demo") / "chat")


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = "\n\n".join(f"On day {day} the time traveller set out again, {day * 7} years ahead." for day in range(200))
    (tmp_path / "the-time-machine.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(demo, "BOOKS", tmp_path)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(demo, "BLOCKS", 4)
    return tmp_path


def test_it_writes_measures_compares_and_sums_up(
    model_dir: Path, books: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(highlight=False, width=200)
    result = demo.run(console, model_dir, new_tokens=4)
    demo.summary(console, {**result, "drafts": LEFT_OUT, "seconds": 1.0})
    result = json.loads(json.dumps(result))

    assert [len(text["depths"]) for text in result["texts"]] == [4]
    assert [row["batch"] for row in result["speed"]] == [1, 16, 64]
    assert all(row["on"] > 0 and 1 <= row["mean_cycles"] <= 3 for row in result["speed"])
    on, off = result["text"]["on"], result["text"]["off"]
    assert result["text"]["flops_saved"] == pytest.approx(1 - on["flops_per_token"] / off["flops_per_token"])
    pair = result["pair"]
    zero_keys_and_scalars = 3 * 2 * 4 * 32 + 2
    assert pair["ztt"]["parameters"] - pair["vanilla"]["parameters"] == zero_keys_and_scalars
    assert pair["tokens"] == 4 * 128
    assert [len(pair[name]["loss_by_cycle"]) for name in ("ztt", "vanilla")] == [3, 1]

    out = capsys.readouterr().out
    assert demo.PROMPTS[0] in out
    assert "depth of each new token: " in out
    assert f"{pair['vanilla']['loss']:.4f} on 512 tokens" in out
    assert f"{abs(pair['ztt']['loss'] - pair['vanilla']['loss']):.4f}" in out


def test_the_shipped_pair_is_what_its_cards_say() -> None:
    """Every further cycle lowers the loss, and the last one lies below that of the vanilla model."""
    pair = demo.compare(Console(quiet=True), demo.PAIR, demo.UNSEEN, 64)
    first, second, third = pair["ztt"]["loss_by_cycle"]
    assert first > second > third
    assert pair["ztt"]["loss"] < pair["vanilla"]["loss"] - 0.02
    assert pair["ztt"]["parameters"] < 1.001 * pair["vanilla"]["parameters"]


def test_it_decodes_with_drafts_and_plainly(chat_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafts = demo.decode(Console(highlight=False, width=200), str(chat_dir), "lookup", 12)
    assert [answer["prompt"] for answer in drafts["answers"]] == list(demo.QUESTIONS)
    assert drafts["new_tokens"] == sum(answer["new_tokens"] for answer in drafts["answers"]) == 12 * len(demo.QUESTIONS)
    assert drafts["equal"] is True
    for row in (*drafts["answers"], drafts):
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["plain_tokens_per_second"])
        of_own = row["tokens_per_second"] / row["own_plain_tokens_per_second"]
        assert row["speedup_over_own_plain"] == pytest.approx(of_own)
    accepted = sum(answer["stats"]["accepted"] for answer in drafts["answers"])
    steps = sum(answer["stats"]["steps"] for answer in drafts["answers"])
    assert drafts["mat"] == pytest.approx((accepted + steps) / steps, abs=0.1)
    out = capsys.readouterr().out
    assert out.count(" as fast as our plain decoding") == len(demo.QUESTIONS)
    for answer in drafts["answers"]:
        assert f"{answer['prompt']}\n" in out
    assert out.count("the same tokens") == out.count("[-rejected-]") == len(demo.QUESTIONS)

    demo.sum_up_drafts(Console(highlight=False, width=80), drafts)
    total = f"{drafts['speedup']:.2f}x, {drafts['speedup_over_own_plain']:.2f}x"
    assert re.search(rf"\n *all .* {total} ", capsys.readouterr().out)


def test_a_target_that_cannot_be_had_is_one_sentence_and_the_rest_goes_on(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, Any] = {"model": {}}
    monkeypatch.setattr(demo, "run", lambda *args: ran)
    monkeypatch.setattr(demo, "summary", lambda console, result: ran.update(result))
    assert demo.main(["--model", str(model_dir), "--target", "nowhere"]) == 0
    assert "'nowhere' is not a model directory" in ran["drafts"]["left_out"]
    assert capsys.readouterr().out.count("left out: 'nowhere' is not a model directory") == 1


def test_on_a_terminal_depths_are_colours(model_dir: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zerodraft.cli.loading import load_ztt
    from zerodraft.models.tokenizers import load_tokenizer

    model, path = load_ztt(str(model_dir))
    console = Console(file=sys.stdout, force_terminal=True, color_system="truecolor", width=200)
    demo.write(console, model, load_tokenizer(path), model.calibrated_exit_rule(), 4)
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "depth of each new token" not in out


def test_a_missing_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("demo: no model at ")


def test_a_model_without_a_rule_is_one_sentence(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "copy"
    path.mkdir()
    for file in model_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "exit_rule": None}))
    assert demo.main(["--model", str(path), "--target", "nowhere"]) == 2
    assert "no calibrated exit rule" in capsys.readouterr().err


def test_json_is_the_last_line(
    model_dir: Path, chat_dir: Path, books: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "speed", lambda *args: [])
    words = ["--model", str(model_dir), "--new-tokens", "2", "--target", str(chat_dir), "--answer-tokens", "3"]
    assert demo.main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["pair"]["tokens"] == 512
    assert result["drafts"]["new_tokens"] == 3 * len(demo.QUESTIONS)
    assert "Summary" in captured.err
