"""`zerodraft chat` on piped input: answers, statistics, commands, and how it ends."""

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from zerodraft.cli import chat as chat_module
from zerodraft.cli.main import main
from zerodraft.models.tokenizers import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_dir(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(plain_dir, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", "--drafter", "lookup", "--max-new-tokens", "6", *words])


def plain_answer(path: Path, messages: list[dict[str, str]]) -> str:
    tokenizer: Any = load_tokenizer(path)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = AutoModelForCausalLM.from_pretrained(path).generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_conversation(chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = "the cat\n\n/what\nthe fox\n/new\nthe cat\n/quit\nnever read\n"
    assert chat(monkeypatch, typed, "--target", str(chat_dir), "--json") == 0
    captured = capsys.readouterr()
    answers = json.loads(captured.out.rstrip("\n").split("\n")[-1])["answers"]
    assert [answer["message"] for answer in answers] == ["the cat", "the fox", "the cat"]
    first = {"role": "user", "content": "the cat"}
    assert answers[0]["text"] == plain_answer(chat_dir, [first])
    history = [first, {"role": "assistant", "content": answers[0]["text"]}, {"role": "user", "content": "the fox"}]
    assert answers[1]["text"] == plain_answer(chat_dir, history)
    assert answers[2]["text"] == answers[0]["text"]
    assert captured.err.count("tokens/s") == 3
    assert "/what is not a command" in captured.err
    assert all(answer["new_tokens"] == 6 for answer in answers)


def test_earlier_turns_are_not_computed_again(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "the cat\nthe fox\nonce upon a time\n/new\nthe fox\n"
    assert chat(monkeypatch, typed, "--target", str(chat_dir), "--system", "be kind", "--json") == 0
    answers = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["answers"]
    assert answers[0]["reused_tokens"] == 0
    for before, after in pairwise(answers[:3]):
        # all but the answer, which may come to other tokens when it is read as text
        assert after["reused_tokens"] >= before["prompt_tokens"] - 1
    messages, system = [], {"role": "system", "content": "be kind"}
    for answer in answers[:3]:
        messages.append({"role": "user", "content": answer["message"]})
        assert answer["text"] == plain_answer(chat_dir, [system, *messages])
        messages.append({"role": "assistant", "content": answer["text"]})
    # a new conversation begins with the same system message
    assert 0 < answers[3]["reused_tokens"] < answers[0]["prompt_tokens"]
    assert answers[3]["text"] == plain_answer(chat_dir, [system, {"role": "user", "content": "the fox"}])


def test_it_ends_with_the_input_and_takes_a_system_message(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "hi", "--target", str(chat_dir), "--system", "be kind", "--json") == 0
    (answer,) = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["answers"]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert answer["text"] == plain_answer(chat_dir, messages)


def test_an_interrupt_stops_the_answer_and_not_the_program(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speculate, calls = chat_module.speculate, []

    def interrupted(model: Any, decode: Any, inputs: Any, sampling: Any, streamer: Any, tokenizer: Any) -> Any:
        calls.append(inputs["input_ids"].shape[1])
        if len(calls) == 1:
            streamer.on_finalized_text("a fox")
            raise KeyboardInterrupt
        return speculate(model, decode, inputs, sampling, streamer, tokenizer)

    monkeypatch.setattr(chat_module, "speculate", interrupted)
    assert chat(monkeypatch, "the cat\nhi\n", "--target", str(chat_dir), "--json") == 0
    captured = capsys.readouterr()
    first, second = json.loads(captured.out.rstrip("\n").split("\n")[-1])["answers"]
    assert first == {"message": "the cat", "text": "a fox", "stopped": True}
    assert "stopped" in captured.err
    messages = [("user", "the cat"), ("assistant", "a fox"), ("user", "hi")]
    assert second["text"] == plain_answer(chat_dir, [{"role": role, "content": text} for role, text in messages])
    assert second["stopped"] is False


def test_bytes_that_are_no_text(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"f\xfcr\nhi\n"), encoding="utf-8"))
    assert main(["chat", "--drafter", "lookup", "--max-new-tokens", "2", "--target", str(chat_dir), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["answers"]
    assert [answer["message"] for answer in answers] == ["f\N{REPLACEMENT CHARACTER}r", "hi"]


def test_a_conversation_that_outgrows_the_context_can_start_anew(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = shutil.copytree(chat_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (model / "config.json").write_text(json.dumps(config))
    assert chat(monkeypatch, f"{'cat ' * 50}\nhi\n", "--target", str(model)) == 0
    out = capsys.readouterr().out
    assert "the model reads at most 40" in out
    assert out.count("tokens/s") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--drafter", "lookup:x"], "after 'lookup:' comes"),
        (["--drafter", "nobody"], "The drafter is neither"),
        ([], "no chat template"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    message: str,
    plain_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert chat(monkeypatch, "hi\n", "--target", str(plain_dir), *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
