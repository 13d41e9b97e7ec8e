"""Text and JSON files as people save them, and what is none."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from zerodraft.bench.prompts import read_questions
from zerodraft.cli.generate import Generate
from zerodraft.common.errors import ZerodraftError, printable, reading
from zerodraft.common.files import json_object, read_json, read_text, user_path, whole_characters
from zerodraft.training.data import read_documents
from zerodraft.training.prompts import read_prompts
from zerodraft.training.recipe import DataRecipe, load_recipe

QUESTION = '{"question_id": 1, "category": "qa", "turns": ["What is a fox?"]}\n'
READERS: dict[str, tuple[str, Any]] = {
    "prompt.jsonl": ('{"question": "What is a fox?"}\n', lambda file: read_prompts([file])[0].text),
    "prompt.txt": ("What is a fox?\n", lambda file: read_prompts([file])[0].text),
    "question.jsonl": (QUESTION, lambda file: read_questions([file])[0].text),
    "one.txt": ("What is a fox?", lambda file: Generate(prompt_file=file)._prompt()),
    "data.jsonl": ('{"text": "What is a fox?"}\n', lambda file: read_documents((file,), DataRecipe())[0]),
    "data.txt": ("What is a fox?", lambda file: read_documents((file,), DataRecipe())[0]),
    "recipe.yaml": ("output: What is a fox?\n", lambda file: load_recipe(file).output),
    "some.json": ('{"a": "What is a fox?"}', lambda file: read_json(Path(file))["a"]),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, newline: str, tmp_path: Path) -> None:
    text, read = READERS[name]
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / name).write_text(text, encoding=encoding, newline=newline)
        assert read(str(tmp_path / name)) == "What is a fox?"


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_text_is_a_sentence(name: str, tmp_path: Path) -> None:
    _, read = READERS[name]
    (tmp_path / name).write_bytes(b"output: \xff\xfe\n")
    with pytest.raises(ZerodraftError, match="is not UTF-8 text"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("name", [name for name in READERS if name != "one.txt"])  # a prompt may come through a pipe
def test_a_pipe_is_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ZerodraftError, match=r"is a pipe|no data at"):
        READERS[name][1](str(tmp_path / name))


@pytest.mark.parametrize("escape", ["\\ud83d", "\\uDE00", "\\ud83d \\ude00"])
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith("jsonl")])
def test_half_an_emoji_in_json_is_a_replacement_character(escape: str, name: str, tmp_path: Path) -> None:
    text, read = READERS[name]
    (tmp_path / name).write_text(text.replace("fox", escape))
    found = read(str(tmp_path / name))
    assert "\N{REPLACEMENT CHARACTER}" in found
    assert found.encode()


def test_whole_characters() -> None:
    assert whole_characters({"a\udce9": ["\ud83d\ude00", 1, None, "\ude00"]}) == {"a\ufffd": ["😀", 1, None, "\ufffd"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be an object with fields, got list"),
        ("{", "is not JSON"),
        ('{"a": ' * 100_000, "nested too deep"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_no_object(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ZerodraftError, match=message):
        read_json(tmp_path / "a.json")


def test_json_of_any_depth_is_read_or_refused() -> None:
    refused = 0
    for depth in range(100, 3000, 200):
        try:
            # half a character makes all of it be walked through
            json_object('{"a": ' + "[" * depth + '"\\ud83d"' + "]" * depth + "}", "The file 'a'")
        except ZerodraftError:
            refused += 1
    assert 0 < refused < 15


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path, message in (("pipe", "is a pipe"), (".", "is a directory"), ("gone", "No such"), ("nowhere", "No such")):
        with pytest.raises(ZerodraftError, match=message):
            read_text(tmp_path / path)
    with pytest.raises(ZerodraftError, match="is a device"):
        read_text(Path("/dev/zero"))


def test_a_home_that_is_not_known() -> None:
    with pytest.raises(ZerodraftError, match="write the path without '~'"):
        user_path("~nobody-of-that-name/x")


def test_whatever_another_library_raises_is_a_sentence() -> None:
    class Panic(BaseException):
        """As Rust code raises it in Python."""

    for error in (TypeError("a\nb"), KeyError("k"), MemoryError(), RecursionError(), ZeroDivisionError(), Panic("x")):
        with (
            pytest.raises(ZerodraftError, match=r"^The file 'a' could not be loaded: [^\n]+\.$"),
            reading("The file 'a'"),
        ):
            raise error
    for kept in (KeyboardInterrupt, ZerodraftError):
        with pytest.raises(kept), reading("The file 'a'"):
            raise kept


def test_nothing_steers_the_terminal() -> None:
    assert printable("a\x1b[31mb\u202ec\x07\udce9 é漢\ufffd") == "a\\x1b[31mb\\u202ec\\x07\\udce9 é漢\ufffd"


@pytest.mark.parametrize("row", [{"text": ["a", "b"]}, {"text": {"a": 1}}, {"text": 5}, {}])
def test_rows_without_a_text_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A fox."}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ZerodraftError, match=r"a\.jsonl' line 2 has (null|a \w+|no field)"):
        read_documents((str(tmp_path / "a.jsonl"),), DataRecipe())


@pytest.mark.parametrize("template", ["{q} {a}", "{q", "{q.__class__.no}", "{0}", "{}", "{nothing}"])
def test_templates_that_a_row_does_not_fill(template: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "A fox?", "a": null}\n')
    with pytest.raises(ZerodraftError):
        read_documents((str(tmp_path / "a.jsonl"),), DataRecipe(template=template))
    assert read_documents((str(tmp_path / "a.jsonl"),), DataRecipe(template="{{{q}}}")) == ["{A fox?}"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml\n"}, "extends itself"),
        (
            {"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"},
            r"a\.yaml' extends '.*b\.yaml', which extends '.*a\.yaml'",
        ),
        ({"a": "extends: b.yaml\n", "b": "extends: c.yaml\n", "c": "extends: b.yaml\n"}, "one of them must stand"),
        ({"a": "output: " + "[" * 5000}, "not valid YAML"),
        ({"a": "output: 2001-99-99\n"}, "not valid YAML"),
        ({"a": "? {a: b}\n: 1\n"}, "not valid YAML"),
        (
            {"a": "x0: &x0 [1, 1]\n" + "".join(f"x{i + 1}: &x{i + 1} [*x{i}, *x{i}]\n" for i in range(40))},
            "100,000 values",
        ),
        ({"a": "output: &x [*x]\n"}, "100,000 values"),
        ({"a": 'output: "\\0"\n'}, "whole characters"),
        ({"a": 'output: "\\ud83d"\n'}, "whole characters"),
        ({"a": "output: x\nseed: " + "9" * 30 + "\n"}, "at most 9223372036854775807"),
        ({"a": "output: x\nseed: " + "9" * 5000 + "\n"}, "not valid YAML"),
        ({"a": "output: x\nloss: {token_depths: 1" + "0" * 400 + "}\n"}, "must be a number"),
        ({"a": "output: x\ndata: {document_chars: 0}\n"}, "data.document_chars is 0; it must be at least 1"),
    ],
)
def test_recipes_of_a_stranger(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ZerodraftError, match=message):
        load_recipe(tmp_path / "a.yaml")
