"""Distillation: the plan, what is written, and that neither a kill nor a full disk loses or spoils anything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training.test_prompts import TEMPLATE
from zerodraft.common.errors import ZerodraftError
from zerodraft.training.drafters.completions import read_completions
from zerodraft.training.drafters.distill import DistillSettings, Done, Writer, distill, plan
from zerodraft.training.drafters.writer import HfWriter
from zerodraft.training.prompts import Prompt, PromptEncoder
from zerodraft.training.tokenizer import train_tokenizer

PROMPTS = [Prompt("the cat" + " sat" * (i % 5), "cats") for i in range(9)]
SETTINGS = DistillSettings(batch_size=2, max_new_tokens=5, max_prompt_tokens=40)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    size=st.integers(1, 7),
    invent=st.integers(0, 9),
    greedy=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 3),
)
def test_every_prompt_is_planned_once(lengths: list[int], size: int, invent: int, greedy: float, seed: int) -> None:
    chosen = DistillSettings(batch_size=size, invent=invent, greedy=greedy, seed=seed)
    batches = plan(lengths, chosen)
    assert sorted(i for batch in batches for i in batch.prompts) == list(range(len(lengths)))
    assert sum(batch.invent for batch in batches) == invent
    assert [batch.number for batch in batches] == list(range(len(batches)))
    assert all(len(batch.prompts) <= size and batch.invent <= size for batch in batches)
    allowed = {0.0} if greedy == 1 else {0.7, 1.0} if greedy == 0 else {0.0, 0.7, 1.0}
    assert {batch.temperature for batch in batches} <= allowed
    assert plan(lengths, chosen) == batches
    for temperature in allowed:
        ranges = sorted(
            (min(sizes), max(sizes))
            for batch in batches
            if batch.prompts and batch.temperature == temperature
            for sizes in [[lengths[i] for i in batch.prompts]]
        )
        assert all(low[1] <= high[0] for low, high in pairwise(ranges))


def make_tokenizer() -> Any:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 4, 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


class Parrot:
    """Says 1, 2, 3, ...; then the end. Optionally slowly, and fails when told to."""

    vocab_size, context, eos_ids = 300, None, frozenset([1])

    def __init__(self, seconds: float = 0.0, fail_at: int = -1) -> None:
        self.seconds, self.fail_at, self.calls = seconds, fail_at, 0

    def write(
        self, prompts: Sequence[Sequence[int]], settings: DistillSettings, *, temperature: float, limit: int, seed: int
    ) -> list[list[int]]:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self.seconds)
        return [[20 + seed % 7 + i for i in range(limit - 1)] + [1] for _ in prompts]


def run(out: Path, writer: Writer | None = None, chosen: DistillSettings = SETTINGS, **extra: Any) -> dict[str, Any]:
    encoder = PromptEncoder(make_tokenizer())
    return distill(writer or Parrot(), encoder, PROMPTS, out, chosen, target={"name": "parrot"}, **extra)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_result_reads_back(tmp_path: Path) -> None:
    seen: list[Done] = []
    manifest = run(tmp_path / "out", on_batch=seen.append, provenance={"why": "a test"})
    found = read_completions(tmp_path / "out")
    assert len(found) == manifest["sequences"] == len(PROMPTS)
    written = (found.lengths - found.prompt_lengths).sum()
    assert written == manifest["completion_tokens"] == 45 == seen[-1].tokens
    assert seen[-1].batches == seen[-1].total == len(found.shards)
    assert set(found.sources) == {"cats"}
    tokens, prompt_length = found[0]
    assert tokens[-1] == 1
    assert len(tokens) - prompt_length == 5
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["finished"]
    assert manifest["why"] == "a test"


def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Parrot(fail_at=2))
    assert len(read_completions(tmp_path / "parts").shards) == 2
    assert not json.loads((tmp_path / "parts" / "manifest.json").read_text())["finished"]
    writer = Parrot()
    run(tmp_path / "parts", writer)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert writer.calls == len(read_completions(tmp_path / "whole").shards) - 2
    writer = Parrot()
    run(tmp_path / "parts", writer)
    assert writer.calls == 0


CHILD = "import sys; from pathlib import Path; from tests.training.drafters.test_distill import Parrot, run; "


def child(code: str, **options: Any) -> "subprocess.Popen[str]":
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code],
        cwd=root,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_killed_process_loses_at_most_the_running_batch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = child(f"run(Path({str(out)!r}), Parrot(seconds=0.3))")
    deadline = time.monotonic() + 240
    while len(list(out.glob("*.jsonl"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(ZerodraftError, match="Another process is writing"):
        run(out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = contents(out)
    assert len(read_completions(out).shards) >= 2
    (out / ".000004.bin.partial").write_bytes(b"half")
    run(out)
    run(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*.partial"))
    finished = {name: data for name, data in kept.items() if name.endswith(".jsonl")}
    assert finished.items() <= contents(out).items()


def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # the kernel refuses to let any file grow beyond this, as a full disk would
    code = (
        "import resource, dataclasses\n"
        "from tests.training.drafters.test_distill import SETTINGS\n"
        "chosen = dataclasses.replace(SETTINGS, max_new_tokens=3000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        f"run(Path({str(out)!r}), chosen=chosen)"
    )
    process = child("\n" + code)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert (
        err.rstrip()
        .split("\n")[-1]
        .endswith(
            "could not be written (File too large): make room and run the same command again; finished work is kept."
        )
    )
    assert [name for name in os.listdir(out) if name not in ("manifest.json", ".lock")] == []


def test_an_error_of_whoever_watches_is_no_full_disk(tmp_path: Path) -> None:
    def closed(done: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run(tmp_path / "out", on_batch=closed)


def test_a_directory_keeps_to_one_way_of_making_them(tmp_path: Path) -> None:
    run(tmp_path / "out")
    with pytest.raises(ZerodraftError, match="made with other top_k, seed"):
        run(
            tmp_path / "out",
            chosen=DistillSettings(batch_size=2, max_new_tokens=5, max_prompt_tokens=40, seed=1, top_k=5),
        )
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(ZerodraftError, match="not a completions manifest"):
        run(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ZerodraftError, match="holds other files"):
        run(tmp_path / "other")
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]


def test_prompts_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    lengths = [len(PromptEncoder(make_tokenizer())(prompt.text)) for prompt in PROMPTS]
    longest = sorted(lengths)[4]
    short = DistillSettings(batch_size=2, max_new_tokens=5, max_prompt_tokens=longest)
    manifest = run(tmp_path / "out", chosen=short)
    fitting = sum(length <= longest for length in lengths)
    assert manifest["made_with"]["prompts"] | {"sha256": ""} == {"count": 9, "used": fitting, "sha256": ""}
    assert 0 < len(read_completions(tmp_path / "out")) == fitting < 9
    with pytest.raises(ZerodraftError, match="None of the 9 prompts fits into the 2 tokens"):
        run(tmp_path / "none", chosen=DistillSettings(max_prompt_tokens=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"greedy": 1.5}, "--greedy is 1.5"),
        ({"temperatures": (0.0,)}, "--temperatures is"),
        ({"temperatures": ()}, "--temperatures is"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ZerodraftError, match=message):
        DistillSettings(**changes)


def test_a_batch_is_what_the_target_writes_row_by_row(model: LlamaForCausalLM, tokenizer: Any) -> None:
    writer = HfWriter(model, tokenizer)
    assert isinstance(writer, Writer)
    prompts = [tokenizer(text)["input_ids"] for text in ("the", "the cat sat on", "mat")]
    together = writer.write(prompts, SETTINGS, temperature=0.0, limit=12, seed=0)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert completion == alone.tolist()


def test_sampling_follows_the_seed_and_leaves_the_global_one(model: LlamaForCausalLM, tokenizer: Any) -> None:
    writer, prompts = HfWriter(model, tokenizer), [[5, 6, 7]] * 2
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, again, other = (writer.write(prompts, SETTINGS, temperature=1.0, limit=9, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[1]
    assert torch.equal(torch.get_rng_state(), state)


class Inventor(Parrot):
    """Asked for users' turns it says `TURNS`."""

    def __init__(self, turns: list[list[int]], start: list[int]) -> None:
        super().__init__()
        self.turns, self.start, self.asked = turns, start, []

    def write(
        self, prompts: Sequence[Sequence[int]], settings: DistillSettings, *, temperature: float, limit: int, seed: int
    ) -> list[list[int]]:
        if all(list(prompt) == self.start for prompt in prompts):
            assert temperature == 1.0
            return [self.turns[(seed + i) % len(self.turns)] for i in range(len(prompts))]
        self.asked += [list(prompt) for prompt in prompts]
        return super().write(prompts, settings, temperature=temperature, limit=limit, seed=seed)


def test_the_target_invents_prompts(tokenizer: Any, tmp_path: Path) -> None:
    encoder, end = PromptEncoder(tokenizer), [tokenizer.eos_token_id]
    turns = [[*tokenizer(text)["input_ids"], *end] for text in ("the cat", " the cat ", "the mat", " ", "sat " * 99)]
    cut_off = tokenizer("on the")["input_ids"]
    writer = Inventor([*turns, cut_off, []], encoder.user_turn())
    chosen = DistillSettings(batch_size=7, invent=14, max_new_tokens=5, max_prompt_tokens=60)
    manifest = distill(writer, encoder, [], tmp_path / "out", chosen, target={})
    found = read_completions(tmp_path / "out")
    # of seven turns two are the same, one is empty, one too long, one cut off and one nothing
    assert len(found) == manifest["sequences"] == 4
    assert set(found.sources) == {"invented"}
    prompts = [tokens[:length].tolist() for tokens, length in (found[i] for i in range(len(found)))]
    assert sorted(prompts) == sorted([encoder("the cat"), encoder("the mat")] * 2) == sorted(writer.asked)


def test_a_batch_of_which_nothing_is_usable_is_empty_and_done(tokenizer: Any, tmp_path: Path) -> None:
    encoder = PromptEncoder(tokenizer)
    chosen = DistillSettings(batch_size=2, invent=2, max_new_tokens=5, max_prompt_tokens=60)
    writer = Inventor([[5, 6]], encoder.user_turn())
    for _ in range(2):
        assert distill(writer, encoder, [], tmp_path / "out", chosen, target={})["sequences"] == 0
    assert writer.asked == []
