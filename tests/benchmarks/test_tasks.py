"""Zero-shot tasks: lm-evaluation-harness gives the same sums, answers are chosen by them, and the page shows pairs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evidence_plan import Plan, Run
from evidence_runs import make_runs
from evidence_table import read_result
from evidence_tasks import START, TaskScore, TaskTable, section
from tasks import TASKS, Item, answers, item_of, main, score
from tests.saved import save_target, sizes_of, tiny_tokenizer
from tests.ztt.tiny import tiny_plain
from zerodraft.evaluation import questions

PAIRS = [
    ("the cat sat on the", " mat."),
    ("once upon a", " time there was a little fox"),
    ("the cat", " sat"),
]
QUESTIONS = {
    "lambada": [{"context": "the cat sat on the", "continuation": "mat"}] * 3,
    "piqa": [{"query": "Question: the fox\n", "choices": ["sat", "the cat sat on the mat"], "gold": 1}] * 2,
    "arc-easy": [{"query": "Question: a cat", "choices": ["fox", "mat", "cat"], "gold": 0}] * 2,
}


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_sums_are_those_of_lm_evaluation_harness() -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-evaluation-harness")
    api = pytest.importorskip("lm_eval.api.instance")
    tokenizer = tiny_tokenizer()
    model = tiny_plain(vocab_size=len(tokenizer))
    asked = [
        api.Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=at) for at, pair in enumerate(PAIRS)
    ]
    theirs = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu").loglikelihood(asked)
    ours = answers(model, tokenizer, PAIRS, batch_size=2)
    assert [one.log_p for one in ours] == pytest.approx([log_p for log_p, _ in theirs], abs=1e-4)
    assert [one.is_greedy for one in ours] == [is_greedy for _, is_greedy in theirs]


def test_the_highest_sum_is_chosen_and_once_more_by_bytes() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_plain(vocab_size=len(tokenizer))
    # all tokens are equally likely, so that the shortest answer has the highest sum
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    words = [" sat", " the cat sat on the mat"]
    counts = [len(tokenizer.encode(word, add_special_tokens=False)) for word in words]
    items = [Item(context="the fox", choices=(*words,), gold=gold) for gold in (0, 0, 1)]
    found = score(Run("a", "b", 0), "some", items, model, tokenizer, batch_size=8)
    by_bytes = [count / (len(word) - 1) for count, word in zip(counts, words, strict=True)]
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.accuracy_by_bytes == pytest.approx(2 / 3 if by_bytes[0] < by_bytes[1] else 1 / 3)
    expected = (2 * counts[0] + counts[1]) / 3 * torch.tensor(float(len(tokenizer))).log()
    assert found.nats == pytest.approx(float(expected), rel=1e-4)


def test_a_word_is_right_if_it_is_the_most_likely_one() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_plain(vocab_size=len(tokenizer))
    (token,) = tokenizer.encode(" the", add_special_tokens=False)
    ids = tokenizer("the cat", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        state = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        head = model.get_output_embeddings().weight
        head.zero_()
        head[token] = state
    items = [Item(context="the cat", choices=(word,)) for word in (" the", " fox", " mat", " sat")]
    found = score(Run("a", "b", 0), "some", items, model, tokenizer, batch_size=8)
    assert (found.accuracy, found.accuracy_by_bytes) == (0.25, None)


def test_prompts() -> None:
    assert item_of({"context": "a b", "continuation": " c"}) == Item(context="a b", choices=(" c",))
    asked = item_of({"query": "Question: why?\nAnswer:", "choices": ["x", "y"], "gold": 1})
    assert asked == Item(context="Question: why?\nAnswer:", choices=(" x", " y"), gold=1)


def test_from_runs_to_the_page(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = save_target(tmp_path / "start")
    model = {"start": str(start), "cycles": 2, **sizes_of(start)}
    plan = make_plan(seeds=[0], arms={"vanilla": {"model": {"kind": "plain"}}}, recipe={"model": model})
    make_runs(plan, tmp_path / "tiny.json", tmp_path / "runs", words=["again"], tell=lambda text: None)
    words = [str(tmp_path / "runs" / "tiny"), "--results", str(tmp_path)]
    monkeypatch.setenv("ZERODRAFT_DATA", str(tmp_path / "nowhere"))
    assert main(words) == 2
    assert "set ZERODRAFT_DATA to the one that holds 'eval/lambada" in capsys.readouterr().err
    monkeypatch.setenv("ZERODRAFT_DATA", str(tmp_path))
    for task, rows in QUESTIONS.items():
        file = tmp_path / "eval" / questions.TASKS[TASKS[task]].file
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main([*words, "--items", "2"]) == 0
    found = read_result(TaskTable, tmp_path / "tasks-tiny.json")
    assert [one.arm for one in found.results if one.task == "piqa"] == ["(start)", "vanilla", "ztt"]
    page = "\n".join(section(found))
    assert "| piqa | 2 | (start) | 1 |" in page
    assert {one.items for one in found.results} == {2}
    assert main([str(tmp_path / "runs" / "other"), *words]) == 2
    assert "folders of two tables" in capsys.readouterr().err


def test_differences_are_paired_by_seed() -> None:
    def made(arm: str, seed: int, accuracy: float) -> TaskScore:
        return TaskScore(
            arm=arm, rate="a", seed=seed, task="lambada", items=9, accuracy=accuracy, accuracy_by_bytes=None, nats=2.0
        )

    results = (
        made(START, 0, 0.5), made("fine-tuned", 0, 0.25), made("deepened", 0, 0.75), made("deepened", 1, 0.75),
    )  # fmt: skip
    page = "\n".join(section(TaskTable(table="tiny", results=results, provenance={})))
    assert "| lambada | 9 | (start) | 1 | 0.5000 | - | - | - | 2.0000 | - |" in page
    assert "| lambada | 9 | deepened | 2 | 0.7500 [0.7500, 0.7500] | 0.5000 | - | - |" in page
