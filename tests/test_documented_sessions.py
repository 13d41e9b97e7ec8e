"""Every page of the documentation runs: its Python in one namespace and its commands in one folder, from top to bottom.

The words of a page stand for small things here. `smollm2` is a tiny Llama in a cache of the test's own; files and
models that a page takes for granted lie in the folder under the names that the page gives them; and `SMALLER` cuts down
what would take long.
"""

import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.drafters.masked_hub import DREAM, dream_tensors, write
from tests.saved import TEXT, save, save_completions, tiny_llama, tiny_tokenizer
from zerodraft import ZeroMassExit
from zerodraft.cli.main import main
from zerodraft.models.cache import build_once, default_cache_dir

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh|console|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SMALLER = (
    (r"distill\b", "--max-new-tokens=16 --limit=8 --greedy=1"),
    (r"(generate|chat|bench (decode|memory))\b", "--max-new-tokens=6"),
    (r"distill .*--invent", "--invent=2"),
    (r"calibrate\b", "--blocks=2 --block-length=16"),
    (r"(pretrain|finetune|train-drafter)\b", "--training.steps=2 --training.warmup-steps=1"),
    # what stands for SmolLM2 has fewer layers
    (r"finetune recipes/smollm2-deepen", "--model.head-layers=1 --model.tail-layers=1"),
    (r"train-drafter\b", "--held-back.sequences=2"),
    (r"train-drafter (?!.*--kind)", "--drafter.layers=1 --drafter.draft-vocab=0"),
    (r"train-drafter --kind dflash", "--drafter.layers=1"),
    (r"train-drafter --kind masked", "--masked.layers=2"),
    (r"train-drafter --kind autoregressive", "--autoregressive.layers=2"),
    (r"bench decode\b", "--limit=1"),
    (r"bench memory\b", "--methods=hf_plain,full"),
    (r"bench kernels\b", "--quick"),
)
"""Flags that a command gets whose line matches, in place of its own values for them."""

STANDS_FOR = {"FILE": "prompt.txt", "FILES": "notes.txt"}

NOT_RUN = {
    "import ctypes, llama_cpp": "needs llama.cpp and a GGUF file",
    "zerodraft pretrain recipes/ztt-tiny.yaml --resume": "goes on with a run of hours",
    "zerodraft serve": "runs until it is told to end; tests/serve ask it",
    "zerodraft eval": "needs lm-evaluation-harness; tests/evaluation runs it where it is",
}
"""What does not run here, by how it begins, and why."""

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that pages speak of, tiny, and the cache in which `smollm2` is found."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = tiny_llama(tokenizer)
    config.num_hidden_layers = 6  # a DFlash drafter reads five
    target = LlamaForCausalLM(config)

    def build(folder: Path) -> dict[str, Any]:
        save(target, tokenizer, folder)
        return {"source": "test"}

    smollm2 = build_once(home / "cache" / "smollm2", build)
    # compiled once for a machine, not once for a test
    (default_cache_dir() / "kernels").mkdir(parents=True, exist_ok=True)
    (home / "cache" / "kernels").symlink_to(default_cache_dir() / "kernels")
    (home / "completions").mkdir()
    save_completions(home / "completions", target, 8, 12)
    vocabulary = target.config.vocab_size
    write(home / "dream", DREAM | {"vocab_size": vocabulary}, dream_tensors(vocabulary))
    train = f"train-drafter --target {smollm2} --data {home / 'completions'}"
    for kind in ("block", "dflash"):
        run(f"{train} --kind {kind} --drafter.layers 1 --out {home / kind}")
    run(f"export-drafter {home / 'dflash'} {home / 'dflash-z'} --layout z-lab")
    return home


def run(line: str) -> None:
    """A command line after `zerodraft`, made smaller where `SMALLER` says so."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line, comments=True)]
    settings = [setting for pattern, flags in SMALLER if re.match(pattern, line) for setting in flags.split()]
    for setting in settings:
        flag, equals, value = setting.partition("=")
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
        words += [flag, value] if equals else [flag]
    assert main(words) == 0, line


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what pages take for granted."""
    smollm2 = home / "cache" / "smollm2"
    for name in ("MODEL", "my-model", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-32B-Instruct"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(smollm2)
    for name, source in {
        "models/smollm2-drafter": home / "block" / "model",
        "z-lab/Qwen3-4B-DFlash-b16": home / "dflash-z",
        "Dream-v0-Instruct-7B": home / "dream",
        "more-completions": home / "completions",
        "models/ztt-million": ROOT / "models" / "ztt-million",
        "recipes": ROOT / "recipes",
        "examples": ROOT / "examples",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(source)
    shutil.copytree(
        ROOT / "models" / "ztt-million-exits", tmp_path / "models" / "ztt-million-exits"
    )  # `calibrate` writes to it
    texts = ("notes.txt", "prompt.txt", "my-texts/a.txt", "data/text/openstax/a.txt")
    for name in (*texts, "data/text/wikitext2/valid.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            "\n".join(f"{i} {TEXT}" for i in range(20 if name == "prompt.txt" else 200)), "utf-8"
        )
    prompts = "".join(f'{{"prompt": "cat {i}"}}\n' for i in range(8))
    (tmp_path / "prompts.jsonl").write_text(prompts, "utf-8")
    (tmp_path / "data" / "prompts").mkdir()
    shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "data" / "prompts" / "spec_bench_dev.jsonl")
    monkeypatch.setenv("ZERODRAFT_CACHE", str(home / "cache"))
    monkeypatch.setenv("ZERODRAFT_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(page: str, home: Path) -> dict[str, Any]:
    """The names that a page's Python takes for granted."""
    smollm2 = home / "cache" / "smollm2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    if page == "early-exit.md":
        return {"prompt": torch.tensor([[1, 2, 3]]), "tokenizer": tokenizer, "rule": ZeroMassExit(threshold=0.5)}
    if page == "ngram.md":
        return {"model": model}
    if page == "drafters.md":
        small = {"small_model": model, "small_tokenizer": tokenizer, "target_tokenizer": tokenizer}
        return {"model": model, "inputs": tokenizer("the cat", return_tensors="pt")} | small
    return {}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(
    page: Path, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page.read_text(encoding="utf-8")
    if "from peft" in text:
        pytest.importorskip("peft", reason="needs the peft extra")
    if "distill --target smollm2" not in text:
        (folder / "completions").symlink_to(home / "completions")
    namespace: dict[str, Any] = {"__name__": page.stem, **given(page.name, home)}
    for found in BLOCK.finditer(text):
        kind, block = found.groups()
        if block.startswith(tuple(NOT_RUN)):
            continue
        line_number = text.count("\n", 0, found.start()) + 1
        if kind == "python" and page.name != "README.md":  # whose Python tests/test_readme.py runs
            code = "\n" * line_number + block  # so that a traceback names the page's lines
            exec(compile(code, str(page), "exec"), namespace)
        elif kind == "yaml":
            (folder / "small.yaml").write_text(block, encoding="utf-8")
        elif kind == "console":
            (command, answer) = block.removeprefix("$ zerodraft ").splitlines()
            capsys.readouterr()
            assert main(shlex.split(command)) == 2
            assert capsys.readouterr().err.strip() == answer
        elif kind == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("zerodraft ") and not line.startswith(tuple(NOT_RUN)):
                    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
                    run(line.removeprefix("zerodraft "))
