"""How likely texts are: as one computes it by hand, whatever the batch, with what it cost."""

import pytest
import torch

from tests.ztt.tiny import tiny, tiny_plain, tokens
from zerodraft import FixedExit, ZeroMassExit
from zerodraft.common.errors import ZerodraftError
from zerodraft.evaluation.likelihood import Cost, Reader
from zerodraft.ztt.flops import count_flops

ROWS = [row.tolist() for row in tokens(6, 12)]
PAIRS = [(row[:3], row[3:9]) for row in ROWS[:3]] + [(ROWS[3][:8], ROWS[3][8:9]), (ROWS[3][:8], [5]), ([7], [9])]


@torch.no_grad()
def by_hand(model, before, after, **options):
    logits = model(torch.tensor([before + after]), use_cache=False, **options).logits[0]
    rows = logits[len(before) - 1 : -1].log_softmax(-1)
    return float(rows.gather(-1, torch.tensor(after)[:, None]).sum()), rows.argmax(-1).tolist() == after


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rule", [None, FixedExit(cycles=2), ZeroMassExit(threshold=0.4)])
def test_sums_are_those_of_each_text_alone(rule, batch_size: int) -> None:
    model = tiny("llama")
    options = {} if rule is None else {"exit_rule": rule}
    found = Reader(model=model, batch_size=batch_size, rule=rule).answers(PAIRS)
    for (before, after), (log_p, is_greedy) in zip(PAIRS, found, strict=True):
        expected, greedy = by_hand(model, before, after, **options)
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert is_greedy == greedy


def test_answers_that_the_model_would_write_itself_are_greedy() -> None:
    model = tiny_plain()
    prompt = torch.tensor([ROWS[0][:4]])
    written = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    reader = Reader(model=model)
    assert [one.is_greedy for one in reader.answers([(ROWS[0][:4], written), (ROWS[0][:4], [*written[:-1], 0])])] == [
        True,
        written[-1] == 0,
    ]


def test_a_question_with_answers_of_one_token_is_read_once() -> None:
    reader, batches = Reader(model=tiny_plain(), batch_size=8), []
    reader.answers([(ROWS[0], [token]) for token in range(20)], batches.append)
    assert reader.cost.tokens == len(ROWS[0])
    assert batches == [20]


def test_what_reading_costs_is_counted() -> None:
    model = tiny("llama")
    reader = Reader(model=model, batch_size=1, rule=FixedExit(cycles=2))
    reader.answers(PAIRS[:2])
    with count_flops() as counted, torch.no_grad():
        for before, after in PAIRS[:2]:
            model(torch.tensor([before + after])[:, :-1], use_cache=False, exit_rule=FixedExit(cycles=2))
    assert reader.cost == Cost(flops=counted.total, positions=16, tokens=16, cycles=32)
    assert reader.cost.to_dict() == {"flops_per_token": counted.total / 16, "mean_depth": 2.0}
    assert Cost().to_dict() == {}


def test_depths_are_those_of_the_tokens_without_the_padding() -> None:
    model, rule = tiny("llama"), ZeroMassExit(threshold=0.4)
    reader = Reader(model=model, batch_size=8, rule=rule)
    reader.answers(PAIRS)
    alone = Reader(model=model, batch_size=1, rule=rule)
    alone.answers(PAIRS)
    assert (reader.cost.cycles, reader.cost.tokens) == (alone.cost.cycles, alone.cost.tokens)
    assert reader.cost.positions > alone.cost.positions == alone.cost.tokens
    assert 1 < reader.cost.to_dict()["mean_depth"] < 3


def test_a_long_question_loses_its_beginning() -> None:
    model = tiny_plain()
    before, after = ROWS[0][:9], ROWS[0][9:]
    (found,) = Reader(model=model, max_length=6).answers([(before, after)])
    expected, _ = by_hand(model, before[-4:], after)
    assert found.log_p == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ZerodraftError, match="An answer has 3 tokens and at most 2 are read at once"):
        Reader(model=model, max_length=2).answers([(before, after)])
