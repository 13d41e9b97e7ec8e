"""Where an answer's text ends, and what is held back until that is known."""

from typing import Any

import pytest

from zerodraft.decoding.stats import RowStep
from zerodraft.serve.writer import Writer


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


def step(text: bytes) -> RowStep:
    tokens = list(text)
    return RowStep(tokens[:-1], list(range(-1, len(tokens) - 2)), list(range(len(tokens) - 1)), tokens, tokens[-1])


def written(writer: Writer, *steps: bytes) -> list[str]:
    texts = []
    for text in steps:
        texts.append(writer.add(step(text)).text)
        if writer.ended:
            break
    return [*texts, writer.rest()]


def test_text_comes_at_once() -> None:
    assert written(Writer(Letters()), b"ab", b"c") == ["ab", "c", ""]


def test_characters_wait_until_they_are_whole() -> None:
    snowman = "\N{SNOWMAN}".encode()
    assert written(Writer(Letters()), b"a" + snowman[:1], snowman[1:]) == ["a", "\N{SNOWMAN}", ""]
    assert written(Writer(Letters()), snowman[:2]) == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("stops", "steps", "texts", "ended"),
    [
        (["END"], [b"abEN", b"Dc", b"x"], ["ab", "", ""], "stop"),
        (["END"], [b"abEN", b"xEND"], ["ab", "ENx", ""], "stop"),
        (["END"], [b"abEN"], ["ab", "EN"], ""),
        (["aab"], [b"a", b"a", b"a", b"b"], ["", "", "a", "", ""], "stop"),
        (["xy", "b"], [b"abxy"], ["a", ""], "stop"),
        (["\n"], [b"one\ntwo"], ["one", ""], "stop"),
    ],
)
def test_stop_texts(stops: list[str], steps: list[bytes], texts: list[str], ended: str) -> None:
    writer = Writer(Letters(), stops=stops)
    assert written(writer, *steps) == texts
    assert writer.ended == ended


def test_tokens_behind_the_end_count_for_nothing() -> None:
    writer = Writer(Letters(), eos={0}, trace=True, cycles=3)
    piece = writer.add(step(b"ab\0cd"))
    assert (piece.text, piece.tokens, writer.ended, writer.count) == ("ab", [97, 98, 0], "stop", 3)
    (told,) = piece.steps
    assert told["tokens"] == [{"id": 97, "text": "a"}, {"id": 98, "text": "b"}, {"id": 0, "text": "\0"}]
    assert [node["parent"] for node in told["drafted"]] == [-1, 0, 1, 2]
    assert told["accepted"] == [0, 1, 2]
    assert told["cycles"] == [3, 3, 3]
