"""The README does what it says: its Python runs from top to bottom, the commands and files that it names exist."""

import re
from pathlib import Path

import pytest

from zerodraft.cli.main import COMMANDS
from zerodraft.fast.lean import weights

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert BLOCKS
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)
    # decoding with drafts went the fast way, unasked
    assert namespace["target"] in weights._packed


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:^|`)make (?:\w+=\S+ )*(\w+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_the_commands_exist() -> None:
    named = set(re.findall(r"^zerodraft ([\w-]+)", README, re.MULTILINE))
    assert named
    assert named <= {name.split()[0] for name in COMMANDS}


def test_the_files_of_the_tree_exist() -> None:
    (tree,) = re.findall(r"^```text\n(src/.*?)^```$", README, re.MULTILINE | re.DOTALL)
    root, *lines = tree.splitlines()
    room, missing = ROOT / root, []
    for line in lines:
        for name in re.findall(r"[\w/]+(?:/(?= |$)|\.py|\.cpp)", line):
            if name.endswith("/"):
                room = ROOT / root / name
            if not (room if name.endswith("/") else room / name).exists():
                missing.append(str(room / name))
    assert len(re.findall(r"\.py", tree)) > 20
    assert not missing


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_ideas_are_as_short_as_it_says() -> None:
    for room, most in (("decoding", 80), ("ztt", 120)):
        lines = len((ROOT / "src" / "zerodraft" / room / "idea.py").read_text(encoding="utf-8").splitlines())
        assert lines <= most
        (said,) = re.findall(rf"^  {room}/ +idea\.py .* in (\d+) lines$", README, re.MULTILINE)
        assert lines <= int(said) <= most
