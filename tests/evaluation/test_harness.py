"""lm-evaluation-harness through our door: fifty questions of each task as one scores them by hand, with exit rules, and
texts that are written with drafts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")

from tests.evaluation.asked import WORDS, write_questions  # after the skip
from tests.saved import save_target, save_ztt, tiny_tokenizer
from tests.ztt.tiny import randomise
from zerodraft import ZttForCausalLM
from zerodraft.cli.main import main
from zerodraft.common.errors import ZerodraftError
from zerodraft.evaluation.harness import harness_model, load_task, scores
from zerodraft.evaluation.questions import TASKS, read_questions
from zerodraft.ztt.exits import FixedExit, ZeroMassExit
from zerodraft.ztt.rules import rule_of

Instance = pytest.importorskip("lm_eval.api.instance").Instance

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

COUNT = 50
RULES = {"cycles:1": FixedExit(cycles=1), "zero-mass:0.3": ZeroMassExit(threshold=0.3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"), COUNT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Zero Token Transformer of three cycles, each of which says something else."""
    folder = save_ztt(tmp_path_factory.mktemp("model") / "ztt", tiny_tokenizer(), cycle_gates=True)
    model = ZttForCausalLM.from_pretrained(folder)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def by_hand(model: Any, tokenizer: Any, task: str, data: Path, **options: Any) -> dict[str, float]:
    """A task's metrics, text by text."""

    @torch.no_grad()
    def log_p(before: str, after: str) -> tuple[float, bool]:
        start, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (before, before + after))
        logits = model(torch.tensor([whole]), **options).logits[0, len(start) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(whole[len(start) :])
        return float(logits.gather(-1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())

    questions = read_questions(task, data)
    if task == "lambada_openai":
        sums, greedy = zip(*(log_p(one["context"], one["continuation"]) for one in questions), strict=True)
        return {"acc": sum(greedy) / COUNT, "perplexity": math.exp(-sum(sums) / COUNT)}
    right = right_by_length = 0
    for one in questions:
        if task == "winogrande":
            choices = one["context_options"]
            sums = [log_p(choice, f" {one['continuation']}")[0] for choice in choices]
        else:
            choices = one["choices"]
            sums = [log_p(one["query"], f" {choice}")[0] for choice in choices]
        means = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right += sums.index(max(sums)) == one["gold"]
        right_by_length += means.index(max(means)) == one["gold"]
    normed = {} if task == "winogrande" else {"acc_norm": right_by_length / COUNT}
    return {"acc": right / COUNT, **normed}


@pytest.mark.parametrize(("task", "rule"), [*((task, "off") for task in TASKS), *(("piqa", rule) for rule in RULES)])
def test_fifty_questions_as_by_hand(task: str, rule: str, saved: Path, data: Path, tmp_path: Path) -> None:
    folder = saved if rule in RULES else save_target(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    (score,) = scores(harness_model()(model, tokenizer, exit_rule=rule, batch_size=16), load_task(task, data))
    assert (score.task, score.samples) == (task, COUNT)
    options = {"exit_rule": RULES[rule]} if rule in RULES else {}
    expected = by_hand(model, tokenizer, task, data, **options)
    assert {name: score.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert score.cost.keys() == {"flops_per_token", *(["mean_depth"] if options else [])}


def written_task(folder: Path) -> Path:
    """A task whose answers are written."""
    rows = [{"question": " ".join(WORDS[at : at + 3]), "answer": "fox"} for at in range(5)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "written", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "doc_to_text": "question", "doc_to_target": "answer", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
    }  # fmt: skip
    (folder / "written.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder / "written.yaml"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_of_plain_decoding(batch_size: int, tmp_path: Path) -> None:
    lm = harness_model()(str(save_target(tmp_path / "target")), drafter="lookup", batch_size=batch_size)
    options = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    prompts = [" ".join(WORDS[at : at + 3]) for at in range(5)]
    asked = [Instance("generate_until", {}, (prompt, options), at) for at, prompt in enumerate(prompts)]
    for prompt, text in zip(prompts, lm.generate_until(asked, disable_tqdm=True), strict=True):
        ids = torch.tensor([lm.tokenizer.encode(prompt)])
        plain = lm.model.generate(ids, max_new_tokens=12, do_sample=False)
        assert text == lm.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True).split(".")[0]
    (score,) = scores(lm, load_task(str(written_task(tmp_path)), None))
    assert score.cost["tokens_per_pass"] >= 1


def test_texts_follow_the_exit_rule(saved: Path) -> None:
    lm = harness_model()(str(saved), exit_rule="cycles:1", drafter="lookup")
    options = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    (text,) = lm.generate_until([Instance("generate_until", {}, ("the cat", options), 0)], disable_tqdm=True)
    ids = torch.tensor([lm.tokenizer.encode("the cat")])
    plain = lm.model.generate(ids, max_new_tokens=8, do_sample=False, exit_rule=FixedExit(cycles=1))
    assert text == lm.tokenizer.decode(plain[0, 2:], skip_special_tokens=True).split(".")[0]


def test_the_command(
    saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZERODRAFT_DATA", "")
    words = ["eval", str(saved), "--tasks", "piqa,lambada_openai", "sciq", "--data", str(data), "--limit", "4"]
    words += ["--exit-rule", "every", "off", "off", "cycles:2", "--out", str(tmp_path / "scores.json"), "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    printed, kept = json.loads(captured.out), json.loads((tmp_path / "scores.json").read_text())
    assert printed["results"] == kept["results"]
    asked = [(row["exit_rule"], row["task"]) for row in kept["results"]]
    rules = ["cycles:1", "cycles:2", "cycles:3", "off"]
    assert asked == [(rule, task) for rule in rules for task in ("piqa", "lambada_openai", "sciq")]
    assert {row["samples"] for row in kept["results"]} == {4}
    assert kept["versions"]["zerodraft"]
    head, *rows = [line for line in captured.err.split("\n") if line.startswith(("task ", "piqa ", "sciq "))]
    assert head.split() == [
        "task",
        "questions",
        "exit",
        "rule",
        "acc",
        "acc_norm",
        "perplexity",
        "MFLOPs/token",
        "cycles/token",
    ]
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "piqa", "--data", "nowhere"], "no questions at 'nowhere/piqa/piqa_valid_foundry.jsonl'"),
        (["--tasks", "piqa", "--limit", "-1"], "--limit is -1"),
        (["--tasks", "piqa", "--batch-size", "0"], "--batch-size is 0"),
        (["--tasks", "piqa", "--max-length", "0"], "--max-length is 0"),
        (["--tasks"], "--tasks is given without a name"),
        (["--tasks", "", ","], "--tasks is given without a name"),
        (["--tasks", "piqa", "--out", "."], "--out is '.', a directory"),
        (["--tasks", "piqa", "--out", f"{__file__}/a.json"], "no file can be made"),
        (["--tasks", "piqa", "--exit-rule", "cycles"], "needs a whole number"),
        (["--tasks", "nowhere.yaml"], "The task 'nowhere.yaml' could not be read"),
    ],
)
def test_bad_input(
    words: list[str], message: str, saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ZERODRAFT_DATA", "")
    assert main(["eval", str(saved), "--data", str(data), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    model = str(save_target(tmp_path / "target"))
    with pytest.raises(ZerodraftError, match="'cycles:2' is for Zero Token Transformers, and this is a plain llama"):
        harness_model()(model, exit_rule="cycles:2")
    with pytest.raises(ZerodraftError, match="batch_size is 'auto'"):
        harness_model()(model, batch_size="auto")
    assert rule_of(harness_model()(model).model, "off") is None


def test_a_plain_model_has_no_numbers_of_cycles(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_target(tmp_path / "target"))
    assert main(["eval", model, "--tasks", "piqa", "--data", str(data), "--exit-rule", "every"]) == 2
    assert "is for Zero Token Transformers, and this is a plain llama" in capsys.readouterr().err


def test_its_own_command_line_knows_the_model(saved: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "eval").symlink_to(data)
    command = [sys.executable, "-m", "zerodraft.evaluation", "--model", "zerodraft", "--tasks", "piqa", "--limit", "8"]
    command += ["--model_args", f"pretrained={saved},exit_rule=cycles:2", "--output_path", str(tmp_path / "out")]
    variables = os.environ | {"ZERODRAFT_DATA": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["piqa"]
    lm = harness_model()(str(saved), exit_rule="cycles:2")
    (score,) = scores(lm, load_task("piqa", data), limit=8)
    assert results["acc,none"] == score.metrics["acc"]


def test_without_the_extra_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from zerodraft.evaluation import harness

    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ZerodraftError, match=r"not installed: pip install 'zerodraft\[eval\]'"):
        harness.check_installed()
