"""The package works with its own dependencies alone, and importing any part of it has no side effects that show."""

import ast
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import zerodraft

ROOT = Path(__file__).resolve().parent.parent

OPTIONAL = (
    "beartype",
    "datasets",
    "fastapi",
    "gguf",
    "hypothesis",
    "kenlm",
    "llguidance",
    "lm_eval",
    "matplotlib",
    "openai",
    "pandas",
    "peft",
    "prometheus_client",
    "pyarrow",
    "pydantic",
    "pytest",
    "starlette",
    "tensorboard",
    "uvicorn",
)
"""Everything that only the extras install, by import name (and pandas, which one of them brings along)."""

IMPORT_WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
for module in {modules!r}:
    importlib.import_module(module)
"""


def modules() -> list[str]:
    found = pkgutil.walk_packages(zerodraft.__path__, "zerodraft.")
    # importing __main__ runs the program
    return ["zerodraft", "zerodraft_command", *(m.name for m in found if not m.name.endswith("__main__"))]


def test_every_module_imports_with_the_minimal_dependencies_only() -> None:
    # a server is nothing without its libraries; its command says so. vLLM imports what is made of its own parts
    plain = [n for n in modules() if not n.startswith("zerodraft.serve.") and n != "zerodraft.plugins.vllm.model"]
    code = IMPORT_WITHOUT.format(blocked=set(OPTIONAL), modules=plain)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_every_optional_dependency_is_in_an_extra() -> None:
    project = project_table()
    required = {name(requirement) for requirement in project["dependencies"]}
    assert not required & set(OPTIONAL)
    extras = {name(r) for rs in project["optional-dependencies"].values() for r in rs}
    assert {"datasets", "gguf", "matplotlib", "peft", "pyarrow", "tensorboard"} <= extras


def test_direct_dependencies_are_pinned_for_tests() -> None:
    project = project_table()
    pinned = {
        name(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    }
    extras = {name(r) for rs in project["optional-dependencies"].values() for r in rs}
    wanted = {name(r) for r in project["dependencies"]} | extras
    assert wanted - pinned - {"zerodraft", "vllm"} == set()  # vLLM's are in constraints-vllm.txt


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version("zerodraft") == zerodraft.__version__
    assert f"version: {zerodraft.__version__}\n" in citation
    assert f"## [{zerodraft.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def project_table() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name(requirement: str) -> str:
    for mark in ("[", "=", ">", "<", " ", ";"):
        requirement = requirement.split(mark)[0]
    return requirement


def test_the_oldest_python_that_is_promised_can_read_every_file() -> None:
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text("utf-8")
    for path in (ROOT / "src").rglob("*.py"):
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))


def test_what_is_imported_by_a_name_in_a_text_keeps_to_the_rooms_too() -> None:
    """`make quality` checks import statements; it cannot see what `import_module` and the like are given."""
    named = []
    for path in sorted((ROOT / "src" / "zerodraft").rglob("*.py")):
        room = path.relative_to(ROOT / "src" / "zerodraft").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # `zerodraft.room.module` or the beginning of one, with nothing else in the text
                parts = node.value.partition(":")[0].split(".")
                if len(parts) > 2 and parts[0] == "zerodraft" and all(p.isidentifier() for p in parts[:-1]):
                    named.append((room, parts[1], node.value))
    assert len(named) > 5
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    rooms = tools["importlinter"]["contracts"][0]["layers"]
    # old names are found in front of all rooms
    assert not [each for each in named if each[0] != "moved.py" and rooms.index(each[0]) > rooms.index(each[1])]
