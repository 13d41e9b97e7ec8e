"""lm-evaluation-harness on a Zero Token Transformer: its numbers are those that one computes by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
Instance = pytest.importorskip("lm_eval.api.instance").Instance

import torch  # noqa: E402  # after the skip

from tests.saved import save_ztt, tiny_tokenizer  # noqa: E402  # after the skip
from tests.ztt.tiny import randomise  # noqa: E402  # after the skip
from zerodraft import ZttForCausalLM  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

PAIRS = [
    ("the cat sat on the", " mat."),
    ("once upon a", " time there was a little fox"),
    ("", "a little fox who could not sleep."),
    ("the cat", " sat"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_ztt(tmp_path_factory.mktemp("model") / "ztt", tiny_tokenizer(), cycle_gates=True)
    model = ZttForCausalLM.from_pretrained(folder)
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harness(saved: Path) -> Any:
    return HFLM(
        pretrained=ZttForCausalLM.from_pretrained(saved), tokenizer=tiny_tokenizer(), batch_size=3, device="cpu"
    )


@torch.no_grad()
def by_hand(harness: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether greedy decoding writes it; one text alone, without a cache."""
    before, both = (
        harness.tokenizer.encode(text, add_special_tokens=False) for text in (context, context + continuation)
    )
    targets = both[len(before) :]
    start = before or [harness.prefix_token_id]
    whole = start + targets
    logits = harness.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    rows = logits[len(start) - 1 : len(whole) - 1]
    total = float(rows.gather(-1, torch.tensor(targets)[:, None]).sum())
    return total, rows.argmax(-1).tolist() == targets


def requests(kind: str, arguments: list[tuple]) -> list[Any]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def test_log_likelihoods(harness: Any) -> None:
    answers = harness.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, answers, strict=True):
        expected, is_greedy = by_hand(harness, context, continuation)
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == is_greedy
    texts = [(continuation,) for _, continuation in PAIRS]
    rolling = harness.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    for (text,), total in zip(texts, rolling, strict=True):
        assert total == pytest.approx(by_hand(harness, "", text)[0], abs=1e-3)


def test_generation(harness: Any) -> None:
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    arguments = [(context, options) for context, _ in PAIRS if context]
    answers = harness.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    for (context, _), answer in zip(arguments, answers, strict=True):
        ids = torch.tensor([harness.tokenizer.encode(context)])
        text = harness.model.generate(ids, max_new_tokens=8, do_sample=False)
        assert answer == harness.tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


def test_its_own_command_line(saved: Path, harness: Any, tmp_path: Path) -> None:
    rows = [{"context": context, "continuation": continuation} for context, continuation in PAIRS if context]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "by_hand",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "by_hand.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "by_hand", "--include_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={saved},trust_remote_code=True", "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "out")]
    places = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | places)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["by_hand"]
    answers = [by_hand(harness, row["context"], row["continuation"]) for row in rows]
    mean = sum(total for total, _ in answers) / len(answers)
    assert results["perplexity,none"] == pytest.approx(float(torch.tensor(-mean).exp()), rel=1e-3)
    assert results["acc,none"] == pytest.approx(sum(greedy for _, greedy in answers) / len(answers))
