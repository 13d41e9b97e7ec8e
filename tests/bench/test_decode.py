"""`zerodraft bench decode`: all methods run and agree, a wrong one is found out, an interrupted run goes on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from zerodraft.bench import methods
from zerodraft.bench.decode import encode_all
from zerodraft.bench.methods import Decoded, HuggingFace, Ours
from zerodraft.bench.prompts import read_questions
from zerodraft.cli.main import main

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(target_dir: Path, drafter_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command with `--json` and returns the object on the last line."""

    def run(*words: str, code: int = 0, drafter: str = str(drafter_dir)) -> dict[str, Any]:
        given = ["--target", str(target_dir), "--drafter", drafter, "--prompts", str(prompts), "--json"]
        assert main(["bench", "decode", *given, "--max-new-tokens", "8", *words]) == code
        return json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])

    return run


def test_all_methods_run_and_write_the_same_tokens(
    bench: Bench, target_dir: Path, dflash_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "decode.json"
    everything = [
        "hf_plain",
        "hf_lookup",
        "hf_assisted",
        "hf_dflash",
        "plain",
        "full",
        "no_cps",
        "no_adl",
        "no_tree",
        "no_lean",
    ]
    everything += ["lookup", "block_path", "block_tree"]
    words = ["--methods", ",".join(everything), "--assistant", str(target_dir), "--limit", "3"]
    words += ["--dflash", str(dflash_dir)]
    found = bench(*words, "--output", str(output))
    assert list(found["overall"]) == everything
    for name, values in found["overall"].items():
        assert (values["equal"], values["prompts"], values["tokens"]) == (3, 3, 24), name
        assert values["tokens_per_second"] > 0
        assert values["speedup_by_prompt"]["min"] <= values["speedup_by_prompt"]["max"]
    assert found["overall"]["hf_plain"]["speedup"] == 1
    assert found["overall"]["hf_plain"]["mat"] == found["overall"]["plain"]["mat"] == 1
    # it drafts for itself, so all is accepted
    assert found["overall"]["hf_assisted"]["mat"] > 1.5
    assert (found["equal"], found["identical"], found["subject"]) == (True, True, "full")
    assert found["mat"] == found["overall"]["full"]["mat"]
    speeds = {name: values["tokens_per_second"] for name, values in found["overall"].items()}
    best = max(speeds[name] for name in everything if name.startswith("hf_"))
    assert found["speedup_over_hf_plain"] == pytest.approx(speeds["full"] / speeds["hf_plain"])
    assert found["speedup_over_hf_best"] == pytest.approx(speeds["full"] / best)
    assert found["speedup_over_own_plain"] == pytest.approx(speeds["full"] / speeds["plain"])
    assert set(found["by_task"]) == {"mt_bench", "qa", "rag"}
    assert {"versions", "machine", "threads", "seed", "commit", "command"} <= set(found["provenance"])
    written = json.loads(output.read_text(encoding="utf-8"))
    assert len(written["prompts"]) == 3
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert not output.with_suffix(".rows.jsonl").exists()
    steps = [step for task in written["steps"]["block_tree"].values() for step in task]
    assert sum((accepted + 1) * times for _, accepted, times in steps) >= 3 * 7


def test_a_wrong_method_is_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Ours.decode

    def wrong(self: Ours, inputs: Any, options: Any) -> Decoded:
        found = decode(self, inputs, options)
        if self.about.startswith("full, the best path"):
            found.tokens[0][5] += 1
        return found

    monkeypatch.setattr(Ours, "decode", wrong)
    found = bench("--methods", "full,no_tree", "--limit", "2")
    assert found["overall"]["full"]["equal"] == 2
    assert found["overall"]["no_tree"]["equal"] == found["overall"]["no_tree"]["near_ties"] == 0
    assert (found["equal"], found["identical"]) == (False, False)
    assert [(row["method"], row["place"]) for row in found["differences"]] == [("no_tree", 5)] * 2
    assert all(row["top_gap"] > 1e-3 for row in found["differences"])


def test_a_near_tie_is_no_difference_that_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Ours.decode

    def wrong(self: Ours, inputs: Any, options: Any) -> Decoded:
        found = decode(self, inputs, options)
        found.tokens[0][5] += 1
        return found

    monkeypatch.setattr(Ours, "decode", wrong)
    monkeypatch.setattr("zerodraft.bench.decode.top_gap", lambda model, inputs, tokens: 1e-5)
    found = bench("--methods", "full", "--limit", "2")
    assert (found["equal"], found["identical"]) == (True, False)
    assert found["overall"]["full"]["near_ties"] == 2
    assert len(found["differences"]) == 2


def test_an_interrupted_run_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output, calls = tmp_path / "decode.json", []
    decode = HuggingFace.decode

    def cut(self: HuggingFace, inputs: Any, options: Any) -> Decoded:
        calls.append(inputs["input_ids"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(self, inputs, options)

    monkeypatch.setattr(HuggingFace, "decode", cut)
    words = ("--methods", "full", "--output", str(output))
    bench(*words, code=130)
    rows = output.with_suffix(".rows.jsonl")
    first = rows.read_text(encoding="utf-8").split("\n")
    assert len(first) == 1 + 2 + 1  # settings, two prompts, nothing
    rows.write_text("\n".join(first) + '{"id": "5", "ta', encoding="utf-8")  # killed while writing
    found = bench(*words)
    assert len(calls) == 4 + 1 + 4  # the first run, a warm-up, what was missing
    assert found["prompts_measured"] == 6
    written = json.loads(output.read_text(encoding="utf-8"))
    assert len({row["id"] for row in written["prompts"]}) == 6
    kept = json.loads(first[1])
    again = next(row for row in written["prompts"] if row["id"] == kept["id"])
    assert again["seconds"]["full"] == kept["methods"]["full"]["seconds"]
    assert not rows.exists()


def test_rows_of_other_settings_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    output.with_suffix(".rows.jsonl").write_text(json.dumps({"settings": {"limit": 1}}) + "\n", encoding="utf-8")
    found = bench("--methods", "full", "--output", str(output), code=2)
    assert "was begun with batch=None, this run has 1" in found["error"]


def test_equality_alone_with_references_that_grow(bench: Bench, tmp_path: Path) -> None:
    references = tmp_path / "references.jsonl"
    words = ("--equality-only", "--references", str(references), "--methods", "full,no_lean")
    found = bench(*words, "--batch", "4")
    assert list(found["overall"]) == ["full", "no_lean"]
    assert all(values["equal"] == 6 for values in found["overall"].values())
    assert (found["equal"], found["speedup_over_hf_plain"]) == (True, None)
    assert found["mat"] >= 1
    rows = [json.loads(line) for line in references.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [set(row) for row in rows] == [{"id", "tokens"}] * 6
    # what the file says is believed
    rows[2]["tokens"][5] += 1
    references.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = bench(*words, "--methods", "full")
    assert found["equal"] is False
    assert {(row["id"], row["place"]) for row in found["differences"]} == {(rows[2]["id"], 5)}
    assert "does not end there" in bench(*words, "--max-new-tokens", "20", code=2)["error"]


def test_references_of_a_batch_are_decoded_alone_where_a_method_differs(bench: Bench, tmp_path: Path) -> None:
    references = tmp_path / "references.jsonl"
    words = ("--equality-only", "--references", str(references), "--methods", "full", "--reference-batch", "4")
    assert bench(*words)["equal"] is True
    rows = [json.loads(line) for line in references.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["batched"] for row in rows] == [True] * 6
    rows[2]["tokens"][5] += 1
    references.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert bench(*words)["identical"] is True
    last = json.loads(references.read_text(encoding="utf-8").split("\n")[-2])
    assert last["id"] == rows[2]["id"]
    assert "batched" not in last
    assert last["tokens"] != rows[2]["tokens"]


def test_sampled_tokens_are_not_compared(bench: Bench) -> None:
    found = bench("--methods", "full", "--temperature", "0.8", "--limit", "2")
    assert found["equal"] is None
    assert found["speedup_over_hf_plain"] > 0
    assert found["differences"] == []


def test_without_a_block_drafter_its_methods_are_left_out(bench: Bench) -> None:
    found = bench("--limit", "1", drafter="lookup")
    assert list(found["overall"]) == [
        "hf_plain",
        "hf_lookup",
        "plain",
        "full",
        "no_cps",
        "no_adl",
        "no_tree",
        "no_lean",
    ]
    assert "needs a block drafter" in bench("--methods", "block_tree", code=2, drafter="lookup")["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "ful"], "'ful' is unknown (did you mean 'full'?)"),
        (["--methods", "hf_dflash"], "'hf_dflash' needs --dflash"),
        (["--methods", "llama_cpp_f32"], "'llama_cpp_f32' needs --gguf"),
        (["--max-new-tokens", "1"], "--max-new-tokens is 1; it must be at least 2"),
        (["--limit", "-1"], "--limit is -1; it must be at least 0"),
        (["--batch", "2"], "belong to --equality-only"),
        (["--equality-only", "--temperature", "1"], "leave --temperature out"),
        (["--max-new-tokens", "5000"], "more than the 2048 that the target reads"),
        (["--prompts", "no.jsonl"], "'no.jsonl' cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(bench: Bench, words: list[str], message: str) -> None:
    assert message in bench(*words, code=2)["error"]


class FakeLlama:
    """What `llama_cpp.Llama` is to us, decoding with transformers."""

    def __init__(self, *, model_path: str, n_ctx: int, n_threads: int, n_threads_batch: int, verbose: bool) -> None:
        self.model = LlamaForCausalLM.from_pretrained(Path(model_path).read_text(encoding="utf-8"))
        self.metadata = {"general.file_type": "3" if "quantised" in model_path else "0"}

    def reset(self) -> None:
        """Nothing is kept."""

    def generate(self, tokens: list[int], *, temp: float, repeat_penalty: float) -> Any:
        import torch

        out = self.model.generate(torch.tensor([tokens]), max_new_tokens=20, do_sample=False)
        yield from out[0, len(tokens) :].tolist()


def test_llama_cpp_where_it_is_installed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target_dir: Path, tmp_path: Path
) -> None:
    package = ModuleType("llama_cpp")
    package.Llama = FakeLlama
    package.__spec__ = methods.importlib.util.spec_from_loader("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    files = [tmp_path / "model.gguf", tmp_path / "quantised.gguf"]
    for file in files:
        file.write_text(str(target_dir), encoding="utf-8")
    found = bench("--gguf", *map(str, files), "--methods", "llama_cpp_f32,llama_cpp_q4_1", "--limit", "2")
    assert found["methods"]["llama_cpp_f32"] == "llama.cpp, equal precision (f32)"
    assert found["methods"]["llama_cpp_q4_1"] == "llama.cpp, quantised (q4_1)"
    assert found["overall"]["llama_cpp_q4_1"]["equal"] == 2
    assert found["equal"] is None  # none of ours was measured


def test_prompts_are_spread_over_the_tasks(prompts: Path, tmp_path: Path) -> None:
    three = read_questions([str(prompts)], limit=3)
    assert {question.task for question in three} == {"mt_bench", "qa", "rag"}
    assert read_questions([str(prompts)], limit=3, seed=0) == three
    assert len(read_questions([str(prompts)])) == 6
    other = tmp_path / "other.txt"
    other.write_text("one\ntwo\n", encoding="utf-8")
    found = read_questions([str(prompts), str(other)])
    assert [(q.id, q.text) for q in found if q.task == "other"] == [("other/1", "one"), ("other/2", "two")]


def test_questions_are_encoded_as_the_target_reads_them(prompts: Path, target_dir: Path) -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(target_dir), AutoTokenizer.from_pretrained(target_dir)
    (task, *_) = encode_all(read_questions([str(prompts)]), tokenizer, model, 8)
    assert task.inputs["input_ids"].tolist() == [tokenizer(task.question.text).input_ids]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (chat, *_) = encode_all(read_questions([str(prompts)]), tokenizer, model, 8)
    assert chat.length == task.length + 2
