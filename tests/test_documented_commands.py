"""Every command line and every flag that the documentation, the messages and the help name exists."""

import ast
import dataclasses
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from zerodraft.cli.flags import flags_of, parse
from zerodraft.cli.main import COMMANDS, _load, command_of
from zerodraft.common.errors import ZerodraftError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/README.md"))]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:[.-][a-z0-9_]+)*")
FOREIGN = {
    "README.md": {"--torch-backend"},  # uv's
    "docs/cli.md": {"--a", "--training.step"},  # a typing mistake and what it is answered
    "docs/drafters.md": {"--speculative-algorithm", "--speculative-config", "--speculative-draft-model-path"},
    "docs/serving.md": {"--dtype", "--hf-overrides", "--model"},  # vLLM's
    # of benchmarks/
    "docs/training.md": {"--keep", "--minutes", "--results", "--runs", "--seeds", "--text", "--together"},
    "src/zerodraft/bench/measure.py": {"--porcelain", "--untracked-files"},
    "src/zerodraft/bench/report.py": {"--accent", "--ink", "--line", "--soft"},  # a style sheet's
    "src/zerodraft/cli/command.py": {"--field.key", "--key"},
    "src/zerodraft/cli/flags.py": {"--max", "--max-steps", "--training"},
    "src/zerodraft/evaluation/__main__.py": {"--include"},
    "src/zerodraft/models/wheel.py": {
        "--dest", "--disable-pip-version-check", "--no-deps", "--no-input", "--only-binary", "--retries",
    },
}  # fmt: skip
"""What is no flag of ours, by the file that names it: other programs' flags, and examples of how flags are written."""


def command_lines(page: Path) -> list[str]:
    """The `zerodraft` lines of a page's shell blocks, continued lines joined, comments left away."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"\s*(\w+=\S+ )*zerodraft ", line)]


LINES = [(page, line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{p.name}: {line[:60]}" for p, line in LINES])
def test_a_documented_command_line_is_understood(page: Path, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[words.index("zerodraft") + 1 :]
    for sign in (">", "|", "<"):
        words = words[: words.index(sign)] if sign in words else words
    name, rest = command_of(words)
    if not {"--help", "--help-all"} & set(rest):
        parse(_load(name), rest, name)


@cache
def known_flags() -> tuple[set[str], tuple[str, ...]]:
    """All flags of all commands, and beginnings of those whose last part is free (`--model.ztt.KEY`)."""
    found, free = {"--help", "--help-all", "--version"}, []
    for name in COMMANDS:
        for flag in flags_of(_load(name)):
            found |= {flag.name, flag.negation} if flag.hint is bool else {flag.name}
            if "dict" in str(flag.hint):
                free.append(flag.name + ".")
    return found, tuple(free)


def texts(path: Path) -> list[str]:
    """What a file says to people: a page's lines, a module's strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text.splitlines()
    return [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def unknown_flags(path: Path) -> set[str]:
    """Flags that a file names and no command has. A line with another program's name may name that program's."""
    others = ("pip ", "uv ", "python ", "torchrun", "accelerate", "vllm", "llama", "sglang", "git ", "make ", "lm_eval")
    found, free = known_flags()
    named: set[str] = set()
    for text in texts(path):
        if not any(other in text for other in others):
            named |= {match.replace("_", "-") for match in FLAG.findall(text)}
    named -= found | FOREIGN.get(path.relative_to(ROOT).as_posix(), set())
    return {flag for flag in named if not flag.startswith(free)}


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_is_named_exists(path: Path) -> None:
    assert unknown_flags(path) == set()


def test_examples_and_hints_of_commands_are_understood() -> None:
    for name in COMMANDS:
        words = shlex.split(_load(name).example)
        command = parse(_load(name), command_of(words[1:])[1], name)
        assert dataclasses.is_dataclass(command)
    with pytest.raises(ZerodraftError, match="unknown flag"):
        parse(_load("generate"), ["--no-such-flag", "x"], "generate")
