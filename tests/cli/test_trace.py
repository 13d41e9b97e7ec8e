"""The colours of drafting: the text is whole, and each token has the colour of what happened to it."""

from typing import Any

import pytest
from rich.text import Text

from zerodraft.cli.trace import ACCEPTED, OWN, REJECTED, rejected_path, trace, trace_legend
from zerodraft.common.errors import ZerodraftError
from zerodraft.common.pieces import TextPieces
from zerodraft.decoding.stats import DecodeStats, RowStep, Step


def coloured(text: Text, style: str) -> str:
    return "".join(text.plain[span.start : span.end] for span in text.spans if span.style == style)


def test_each_kind_has_its_colour(tokenizer: Any) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    the, cat, sat, on, fox, mat = map(ids, ("the", " cat", " sat", " on", " fox", " mat"))
    drafted = [*cat, *sat, *fox]
    nodes = list(range(len(drafted)))
    accepted = nodes[: len(cat + sat)]
    rows = [
        RowStep([], [], [], the, the[0]),
        RowStep(drafted, [n - 1 for n in nodes], accepted, [*cat, *sat, *on], on[-1]),
        RowStep([mat[0], fox[0]], [-1, -1], [0], [mat[0]], None),
    ]
    stats = DecodeStats(1, 3, trace=[Step([row]) for row in rows] + [Step([None])])
    found = trace(stats, tokenizer)
    first = tokenizer.decode(mat[:1])
    assert found.plain == f"the cat sat fox on{first}"
    assert coloured(found, ACCEPTED) == f" cat sat{first}"
    assert coloured(found, REJECTED) == " fox"
    assert coloured(found, OWN) == "the on"
    assert trace(stats, tokenizer, marked=True).plain == f"the{{+ cat sat+}}[- fox-] on{{+{first}+}}"
    marked = trace_legend(stats, marked=True).plain
    assert marked.startswith(f"{{+accepted+}} {len(cat + sat) + 1}  [-rejected-] {len(fox)}  the target's own")
    legend = trace_legend(stats).plain
    own = len(the + on)
    assert legend.startswith(f"■ accepted {len(cat + sat) + 1}  ■ rejected {len(fox)}  ■ the target's own {own}")
    assert legend.endswith("and 1 alternatives to them, not shown")


def test_the_rejected_path_goes_on_from_what_was_accepted() -> None:
    #        0 - 1 - 3 - 4        2 - 5
    row = RowStep([10, 11, 12, 13, 14, 15], [-1, 0, -1, 1, 3, 2], [0], [10, 9], 9)
    assert rejected_path(row) == [11, 13, 14]
    assert rejected_path(RowStep(row.drafted, row.parents, [], [9], 9)) == [10, 11, 13, 14]
    assert rejected_path(RowStep(row.drafted, row.parents, [2, 5], [12, 15, 9], 9)) == []


def test_statistics_without_a_trace() -> None:
    with pytest.raises(ZerodraftError, match="trace=True"):
        trace_legend(DecodeStats(1, 3))


def test_a_character_of_several_tokens_waits_for_its_last(tokenizer: Any) -> None:
    tokens = tokenizer("a\N{SNOWMAN}b")["input_ids"]
    assert len(tokens) == 5
    pieces = TextPieces(tokenizer)
    assert [pieces.add(token) for token in tokens] == ["a", "", "", "\N{SNOWMAN}", "b"]
    assert pieces.rest() == ""
    pieces.add(tokens[1])
    assert pieces.rest()
