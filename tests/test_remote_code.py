"""Code that lies beside a model is not run and nobody is asked whether it may, whatever standard input says."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import zerodraft
from tests.saved import save, save_completions, save_ztt, tiny_llama, tiny_tokenizer

PACKAGE = Path(zerodraft.__file__).parent
HELPER = PACKAGE / "models" / "loading.py"
OURS = {"BlockDrafter", "DFlashDrafter", "MaskedDrafter", "PeftModel", "super()"}
"""Classes whose `from_pretrained` runs no code: ours, which use the helper or say no unless their caller says yes
(`super()`), and PEFT's, which knows no such code."""


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a method that can run code beside a model, as `Class.method`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names = ("from_pretrained", "from_config", "pipeline", "load_custom_generate")
    return [(ast.unparse(node.func), node) for node in found if node.func.attr in names]  # type: ignore[attr-defined]


def says_no(call: ast.Call) -> bool:
    values = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
    return len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is False


def test_every_call_says_that_no_code_is_run() -> None:
    found = [(path, *call) for path in sorted(PACKAGE.rglob("*.py")) for call in calls(path)]
    assert len([path for path, _, _ in found if path == HELPER]) == 4
    for path, name, call in found:
        owner, method = name.rsplit(".", 1)
        if owner in OURS:
            continue
        assert path == HELPER or method == "from_config", f"{path} calls {name}: use the helper"
        assert says_no(call), f"{path} calls {name} without trust_remote_code=False"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a plain model, a Zero Token Transformer and texts; every way that code could be named is."""
    folder = tmp_path_factory.mktemp("hostile")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(tokenizer))
    save(model, tokenizer, folder / "plain")
    (folder / "completions").mkdir()
    save_completions(folder / "completions", model, 4, 12)
    save_ztt(folder / "ztt", tokenizer)
    (folder / "text.txt").write_text("the cat sat on the mat. " * 200, encoding="utf-8")
    for name in ("plain", "ztt"):
        make_hostile(folder / name, folder / "was run")
    return folder


def make_hostile(folder: Path, mark: Path) -> None:
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import *\nclass C(LlamaConfig): pass\n"
    code += "class M(LlamaForCausalLM): pass\nclass T(PreTrainedTokenizerFast): pass\n"
    (folder / "mine.py").write_text(code, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(*a, **k): pass\n", encoding="utf-8")
    auto: dict[str, Any] = {"AutoConfig": "mine.C", "AutoModel": "mine.M", "AutoModelForCausalLM": "mine.M"}
    auto["AutoTokenizer"] = ["mine.T", "mine.T"]
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text(encoding="utf-8")) | {"auto_map": auto}
        if name == "tokenizer_config.json":
            fields["tokenizer_class"] = "T"
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")


COMMANDS = {
    "info": "info {}/ztt",
    "generate": "generate --target {}/plain --max-new-tokens 2 hi",
    "generate ztt": "generate --model {}/ztt --max-new-tokens 2 hi",
    "generate drafter": "generate --target {}/plain --drafter {}/plain --max-new-tokens 2 hi",
    "chat": "chat --target {}/plain --max-new-tokens 2",
    "convert": "convert {}/plain --output {}/converted",
    "to-base": "convert {}/ztt --output {}/base --mode to-base",
    "calibrate": "calibrate {}/ztt --text {}/text.txt --budget 0.9 --blocks 1 --block-length 8 --dry-run --output {}",
    "distill": "distill --target {}/plain --prompts {}/text.txt --out {}/out --max-new-tokens 2 --no-chat",
    "train-drafter": "train-drafter --target {}/plain --data {}/completions --out {}/run --training.steps 1",
    "eval-drafter": "eval-drafter {}/plain --target {}/plain --data {}/completions",
    "export-drafter": "export-drafter {}/plain {}/exported",
    "ngram": "ngram build {}/text.txt --target {}/plain --out {}/table",
    "bench": "bench decode --target {}/plain --prompts {}/text.txt --limit 1 --max-new-tokens 2",
    "finetune": "finetune {}/recipe.yaml --model.start {}/plain --data.train {}/text.txt --output {}/run",
}


def test_no_command_runs_it(hostile: Path) -> None:
    (hostile / "recipe.yaml").write_text(
        "output: x\ndata: {context_length: 16, cache: x}\ntraining: {steps: 1, batch_size: 1, use_cpu: true}\n",
        encoding="utf-8",
    )
    lines = [words.replace("{}", ".").split() for words in COMMANDS.values()]
    # one process: imports are what takes long; every command has the same answer to every question
    program = f"import io, sys\nfrom zerodraft.cli.main import main\nfor words in {lines!r}:\n"
    program += "    sys.stdin = io.TextIOWrapper(io.BytesIO(b'y\\nyes\\n' * 20))\n"
    program += "    print(words, file=sys.stderr)\n    print(main(words))\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=hostile, timeout=120, input="y\n" * 99
    )
    assert not (hostile / "was run").exists(), done.stderr
    assert done.returncode == 0, done.stderr
    assert "wish to run" not in done.stdout + done.stderr
    shutil.rmtree(hostile)
