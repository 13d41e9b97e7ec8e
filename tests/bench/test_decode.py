"""`zerodraft bench decode`: all methods run and agree, a wrong one is found out, an interrupted run goes on."""

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.saved import save, tiny_llama
from zerodraft.bench import methods
from zerodraft.bench.decode import closeness, encode_all, order
from zerodraft.bench.decoded import Decoded
from zerodraft.bench.methods import HuggingFace, Ours
from zerodraft.bench.prompts import read_questions
from zerodraft.bench.rows import RowFile
from zerodraft.cli.main import main
from zerodraft.decoding.costs import Costs
from zerodraft.decoding.fallback import UNLIMITED, Fallback
from zerodraft.drafters.hybrid import HybridSession
from zerodraft.training.tokenizer import train_tokenizer

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(target_dir: Path, drafter_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command with `--json` and returns the object on the last line."""

    def run(*words: str, code: int = 0, drafter: str = str(drafter_dir)) -> dict[str, Any]:
        given = ["--target", str(target_dir), "--drafter", drafter, "--json"]
        # given twice they would add up
        given += [] if "--prompts" in words else ["--prompts", str(prompts)]
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
    known = {"versions", "machine", "cpu", "memory_gib", "kernels", "threads", "seed", "sha256", "commit", "command"}
    assert known <= set(found["provenance"])
    weights = (target_dir / "model.safetensors").read_bytes()
    assert found["provenance"]["sha256"]["target"] == hashlib.sha256(weights).hexdigest()[:16]
    assert set(found["provenance"]["sha256"]) == {"target", "drafter", "assistant", "dflash", "prompts"}
    written = json.loads(output.read_text(encoding="utf-8"))
    assert len(written["prompts"]) == 3
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert not output.with_suffix(".rows.jsonl").exists()
    steps = [step for task in written["steps"]["block_tree"].values() for step in task]
    assert sum((accepted + 1) * times for _, accepted, times, _ in steps) >= 3 * 7
    assert all(by_model == (drafted > 0) for drafted, _, _, by_model in steps)
    copied = [step for task in written["steps"]["lookup"].values() for step in task]
    assert any(drafted for drafted, *_ in copied)
    assert not any(by_model for *_, by_model in copied)


def test_steps_that_only_copied_are_told_apart(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # on so small a target no drafter pays, so whether one is asked would hang on the clock
    monkeypatch.setattr(Fallback, "longest", lambda fallback: UNLIMITED)
    monkeypatch.setattr(Costs, "trial", lambda costs, arm: 0)
    asked = True
    monkeypatch.setattr(HybridSession, "_gains", lambda session, rates: asked)

    def kinds(name: str) -> set[tuple[bool, int]]:
        output = tmp_path / name
        bench("--methods", "full", "--max-new-tokens", "40", "--output", str(output))
        steps = json.loads(output.read_text(encoding="utf-8"))["steps"]["full"]
        return {(drafted > 0, by_model) for task in steps.values() for drafted, _, _, by_model in task}

    assert (True, 1) in kinds("asked.json") <= {(True, 1), (False, 0)}
    asked = False
    assert (True, 0) in kinds("never.json") <= {(True, 0), (False, 0)}


def test_orders_are_drawn_and_do_not_go_round_with_the_tasks() -> None:
    names = ["a", "b", "c"]
    # six tasks in turn, as prompts come
    firsts = [{order(names, str(n), 0)[0] for n in range(task, 120, 6)} for task in range(6)]
    assert firsts == [set(names)] * 6
    assert all(sorted(order(names, str(n), 0)) == names for n in range(20))
    assert [order(names, str(n), 0) for n in range(20)] != [order(names, str(n), 1) for n in range(20)]


def test_a_run_that_goes_on_keeps_the_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, prompts: Path, tmp_path: Path
) -> None:
    ran: list[str] = []

    def spy(kind: type, name: Callable[[Any], str]) -> None:
        decode = kind.decode

        def noted(self: Any, inputs: Any, options: Any) -> Decoded:
            if options["max_new_tokens"] == 9:  # not a warm-up, which has fewer
                ran.append(name(self))
            return decode(self, inputs, options)

        monkeypatch.setattr(kind, "decode", noted)

    monkeypatch.setattr("zerodraft.bench.decode.WARM_UP_TOKENS", 2)
    spy(HuggingFace, lambda method: "hf_plain")
    spy(Ours, lambda method: "no_tree" if method.about == methods.OURS["no_tree"].about else "full")
    names = ["hf_plain", "full", "no_tree"]
    drawn = [name for question in read_questions([str(prompts)], limit=30) for name in order(names, question.id, 0)]
    words = ("--methods", "full,no_tree", "--max-new-tokens", "9", "--output", str(tmp_path / "decode.json"))
    add = RowFile.add

    def cut(self: RowFile, row: dict[str, Any]) -> None:
        add(self, row)
        if len(self.rows) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RowFile, "add", cut)
    bench(*words, code=130)
    monkeypatch.setattr(RowFile, "add", add)
    bench(*words)
    assert ran == drawn


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
    assert all(row["top_gap"] > 1e-3 and row["deficit"] > 1e-3 for row in found["differences"])


def test_a_near_tie_is_no_difference_that_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target_dir: Path
) -> None:
    """The target has two tokens that are exactly as good; a method that writes the second is excused, one that writes a
    third is not, and neither is one that stops there."""
    model = LlamaForCausalLM.from_pretrained(target_dir)
    decode, other = Ours.decode, 0

    def tied(self: Any, input_ids: Any, **_: Any) -> Any:
        logits = model(input_ids=input_ids).logits
        best = logits.argmax(-1, keepdim=True)
        logits.scatter_(-1, (best + 1) % logits.shape[-1], logits.gather(-1, best) - 1e-5)
        return SimpleNamespace(logits=logits)

    def wrong(self: Ours, inputs: Any, options: Any) -> Decoded:
        found = decode(self, inputs, options)
        vocabulary = model.config.vocab_size
        found.tokens[0][5:] = [(found.tokens[0][5] + other) % vocabulary] if other else []
        return found

    monkeypatch.setattr(Ours, "decode", wrong)
    monkeypatch.setattr("zerodraft.bench.decode.closeness", lambda model, *args: closeness(tied_model, *args))
    tied_model = type("Tied", (), {"__call__": tied})()
    for other, excused in ((1, True), (2, False), (0, False)):
        found = bench("--methods", "full", "--limit", "2")
        assert (found["equal"], found["identical"]) == (excused, False)
        assert found["overall"]["full"]["near_ties"] == 2 * excused
        assert [row["near_tie"] for row in found["differences"]] == [excused] * 2
        assert all(row["top_gap"] is None if other == 0 else row["top_gap"] < 1e-4 for row in found["differences"])


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


def test_rows_of_other_weights_are_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, drafter_dir: Path, tmp_path: Path
) -> None:
    drafter = shutil.copytree(drafter_dir, tmp_path / "drafter")

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    words = ("--methods", "full", "--limit", "1", "--output", str(tmp_path / "decode.json"))
    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "add", cut)
        bench(*words, code=130, drafter=str(drafter))
    weights = load_file(drafter / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(weights | {name: weights[name] + 1}, drafter / "model.safetensors", metadata={"format": "pt"})
    assert "was begun with sha256=" in bench(*words, code=2, drafter=str(drafter))["error"]


def test_equality_alone_with_references_that_grow(bench: Bench, tmp_path: Path) -> None:
    references = tmp_path / "references.jsonl"
    words = ("--equality-only", "--references", str(references), "--methods", "full,no_lean")
    found = bench(*words, "--batch", "4")
    assert list(found["overall"]) == ["full", "no_lean"]
    assert all(values["equal"] == 6 for values in found["overall"].values())
    assert (found["equal"], found["speedup_over_hf_plain"]) == (True, None)
    assert found["mat"] >= 1
    rows = [json.loads(line) for line in references.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [set(row) for row in rows] == [{"id", "of", "tokens"}] * 6
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


def test_references_of_another_target_or_text_are_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    references = tmp_path / "references.jsonl"
    words = ("--equality-only", "--references", str(references), "--methods", "full")
    bench(*words)
    other = shutil.copytree(target_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "another target or another text" in bench(*words, "--target", str(other), code=2)["error"]
    half = LlamaForCausalLM.from_pretrained(target_dir, dtype="bfloat16"), AutoTokenizer.from_pretrained(target_dir)
    with monkeypatch.context() as patch:
        patch.setattr("zerodraft.cli.bench.load_target", lambda *_: half)
        assert "another target or another text" in bench(*words, code=2)["error"]
    text = tmp_path / "questions.jsonl"
    text.write_text(prompts.read_text(encoding="utf-8").replace(" cat ", " fox "), encoding="utf-8")
    assert "another target or another text" in bench(*words, "--prompts", str(text), code=2)["error"]
    # lines without the key, as they were written once, are believed
    rows = [json.loads(line) for line in references.read_text(encoding="utf-8").split("\n")[:-1]]
    old = [{"id": row["id"], "tokens": row["tokens"], "batched": True} for row in rows]
    references.write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    assert bench(*words)["identical"] is True


def test_an_assistant_with_another_vocabulary(bench: Bench, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a fox and a cat and another mat for the little fox"] * 4, 280)
    assistant = save(LlamaForCausalLM(tiny_llama(tokenizer)), tokenizer, tmp_path / "assistant")
    found = bench("--methods", "hf_assisted", "--assistant", str(assistant), "--limit", "2")
    assert found["overall"]["hf_assisted"]["equal"] == 2


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
    """What `llama_cpp.Llama` is to us, decoding with transformers the model that the file's last line names."""

    loaded: ClassVar[list[str]] = []

    def __init__(self, *, model_path: str, n_ctx: int, n_threads: int, n_threads_batch: int, verbose: bool) -> None:
        self.loaded.append(Path(model_path).stem)
        self.model = LlamaForCausalLM.from_pretrained(Path(model_path).read_bytes().split(b"\n")[-1].decode())

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
    files = [tmp_path / "model.gguf", tmp_path / "quantised.gguf", tmp_path / "unwanted.gguf"]
    for file, kind in zip(files, (0, 3, 7), strict=True):
        file.write_bytes(gguf_head(kind) + b"\n" + str(target_dir).encode())
    FakeLlama.loaded.clear()
    found = bench("--gguf", *map(str, files), "--methods", "llama_cpp_f32,llama_cpp_q4_1", "--limit", "2")
    assert found["methods"]["llama_cpp_f32"] == "llama.cpp, equal precision (f32)"
    assert found["methods"]["llama_cpp_q4_1"] == "llama.cpp, quantised (q4_1)"
    assert found["overall"]["llama_cpp_q4_1"]["equal"] == 2
    assert found["equal"] is None  # none of ours was measured
    assert FakeLlama.loaded == ["model", "quantised"]
    bench("--gguf", str(files[0]), "--methods", "lookup", "--limit", "1")
    assert FakeLlama.loaded == ["model", "quantised"]
    files[0].write_text("a text", encoding="utf-8")
    assert "is not a GGUF file" in bench("--gguf", str(files[0]), "--limit", "1", code=2)["error"]


def gguf_head(file_type: int) -> bytes:
    """Version 3, no tensors, and three pairs: a list of texts, a number, the type."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    listed = text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("tag")
    number = text("llama.rope") + struct.pack("<If", 6, 0.5)
    kind = text("general.file_type") + struct.pack("<II", 4, file_type)
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, 3) + listed + number + kind


def test_prompts_are_spread_over_the_tasks(prompts: Path, tmp_path: Path) -> None:
    three = read_questions([str(prompts)], limit=3)
    assert {question.task for question in three} == {"mt_bench", "qa", "rag"}
    assert read_questions([str(prompts)], limit=3, seed=0) == three
    assert len(read_questions([str(prompts)])) == 6
    assert len(read_questions([str(prompts)], limit=9)) == 6
    other = tmp_path / "other.txt"
    other.write_text("one\ntwo\n", encoding="utf-8")
    found = read_questions([str(prompts), str(other)])
    assert [(q.id, q.text) for q in found if q.task == "other"] == [("other/1", "one"), ("other/2", "two")]


def test_a_task_with_few_prompts_leaves_its_part_to_the_others(tmp_path: Path) -> None:
    files = [tmp_path / "one.txt", tmp_path / "many.txt"]
    files[0].write_text("alone\n", encoding="utf-8")
    files[1].write_text("".join(f"prompt {n}\n" for n in range(20)), encoding="utf-8")
    found = read_questions(list(map(str, files)), limit=10)
    assert [sum(q.task == task for q in found) for task in ("one", "many")] == [1, 9]


def test_questions_are_encoded_as_the_target_reads_them(prompts: Path, target_dir: Path) -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(target_dir), AutoTokenizer.from_pretrained(target_dir)
    (task, *_) = encode_all(read_questions([str(prompts)]), tokenizer, model, 8)
    assert task.inputs["input_ids"].tolist() == [tokenizer(task.question.text).input_ids]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (chat, *_) = encode_all(read_questions([str(prompts)]), tokenizer, model, 8)
    assert chat.length == task.length + 2
