"""The reference of the documentation holds every public name, everything that the pages import, and the two ideas."""

import re
from pathlib import Path

import zerodraft

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {
    name
    for page in (ROOT / "docs" / "reference").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def test_every_public_name_is_there() -> None:
    there = {name.removeprefix("zerodraft.") for name in REFERENCE if name.count(".") == 1}
    assert there == set(zerodraft.__all__)


def test_so_is_what_pages_import() -> None:
    imported = {
        f"{module}.{name.strip()}"
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for module, names in re.findall(r"^from (zerodraft[\w.]*) import (.+)$", page.read_text("utf-8"), re.MULTILINE)
        for name in names.split(",")
    }
    assert len(imported) > 15
    missing = {name for name in imported if name not in REFERENCE and name.rpartition(".")[0] not in REFERENCE}
    assert not missing


def test_so_are_the_two_ideas() -> None:
    page = (ROOT / "docs" / "reference" / "ideas.md").read_text(encoding="utf-8")
    assert re.findall(r'^--8<-- "(.+)"$', page, re.MULTILINE) == ["decoding/idea.py", "ztt/idea.py"]
