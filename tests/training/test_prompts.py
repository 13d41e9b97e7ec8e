"""Prompts: every field of the formats that are promised, each once, and the chat template around them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from zerodraft.common.errors import ZerodraftError
from zerodraft.training.prompts import Prompt, PromptEncoder, fingerprint, read_prompts
from zerodraft.training.tokenizer import train_tokenizer

TEMPLATE = (
    "{{ 'be kind' + eos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = train_tokenizer(["user assistant be kind"] * 4, 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "Sum up.", "input": "", "output": "x"}, "Sum up."),
        ({"instruction": "Sum up.", "input": "A text."}, "Sum up.\n\nA text."),
        ({"instruction": "Sum up.", "context": "A text."}, "Sum up.\n\nA text."),
        ({"instruction": "Sum up.", "instances": [{"input": "A text.", "output": "x"}]}, "Sum up.\n\nA text."),
        ({"question": "How many?", "answer": "2"}, "How many?"),
        ({"problem": "Solve $x + 1 = 2$.", "solution": "1"}, "Solve $x + 1 = 2$."),
        ({"prompt": "Below is\n\n### Instruction:\nwhat\u2028is it?\n\n### Response:\n"}, "what\u2028is it?"),
        ({"text": "Write a function.", "code": "x"}, "Write a function."),
    ],
)
def test_rows(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_prompts([str(file)]) == [Prompt(text, "some")]


def test_text_files_have_one_prompt_a_line_and_none_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \none\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "two"}\n{"prompt": "three"}', encoding="utf-8")
    found = read_prompts([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert found == [Prompt("one", "a"), Prompt("two", "a"), Prompt("three", "b")]
    assert fingerprint(found) != fingerprint(found[::-1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "unknown format"),
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
        ("a.jsonl", b"\n[1]\n", "line 2 must be an object"),
        ("a.jsonl", b'{"answer": "x"}', "has no prompt: expected one of the fields instruction"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt", b"\n", "No prompt in"),
    ],
)
def test_bad_files_are_one_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ZerodraftError, match=message):
        read_prompts([str(tmp_path / name)])


@pytest.mark.parametrize("instances", [["a"], "a", {"input": "a"}])
def test_instances_of_another_kind_are_one_sentence(instances: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"instruction": "x", "instances": instances}))
    with pytest.raises(ZerodraftError, match=r"line 1 has instances that are not a list of objects"):
        read_prompts([str(file)])


def test_a_template_that_refuses_is_one_sentence(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    for template in ("{{ raise_exception('no system role') }}", "{% if %}"):
        tokenizer.chat_template = template
        with pytest.raises(ZerodraftError, match="chat template refuses a conversation of user: "):
            PromptEncoder(tokenizer)("hi")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ZerodraftError, match=r"'nowhere\.txt' cannot be read: No such file"):
        read_prompts(["nowhere.txt"])


def test_the_chat_template_goes_around_a_prompt_and_the_users_turn_ends_where_the_user_speaks(tokenizer: Any) -> None:
    encoder = PromptEncoder(tokenizer)
    assert tokenizer.decode(encoder("hi")) == "be kind<|eos|>user: hi<|eos|>assistant: "
    assert tokenizer.decode(encoder.user_turn()) == "be kind<|eos|>user: "
    assert tokenizer.decode(PromptEncoder(tokenizer, chat=False)("hi")) == "hi"


def test_what_a_tokenizer_without_a_template_cannot_do() -> None:
    bare = train_tokenizer(["x"], 300)
    with pytest.raises(ZerodraftError, match="pass --no-chat"):
        PromptEncoder(bare)
    with pytest.raises(ZerodraftError, match="leave out either --invent or --no-chat"):
        PromptEncoder(bare, chat=False).user_turn()
    bare.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ZerodraftError, match="puts nothing before the user's words"):
        PromptEncoder(bare).user_turn()


@pytest.mark.parametrize("row", [{"input": ["a", "b"]}, {"context": {"a": 1}}, {"instances": [{"input": 5}]}])
def test_a_context_that_is_no_text_is_refused(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Add.", **row}), encoding="utf-8")
    with pytest.raises(ZerodraftError, match=r"line 1 has a (list|dict|int) in input or context, expected a text"):
        read_prompts([str(tmp_path / "a.jsonl")])
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Add?", **row}), encoding="utf-8")
    assert [prompt.text for prompt in read_prompts([str(tmp_path / "a.jsonl")])] == ["Add?"]
