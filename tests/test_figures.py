"""The figures of the two ideas are those that the script draws, and pages show each for light and for dark screens."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from scripts import draw_ideas

ROOT = Path(__file__).resolve().parent.parent
DRAWN = draw_ideas.figures()


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_a_figure_is_as_drawn(path: Path) -> None:
    """If it fails: `python scripts/draw_ideas.py`, and look at the figure."""
    ElementTree.fromstring(DRAWN[path])
    assert path.read_text(encoding="utf-8") == DRAWN[path]


def test_the_step_is_one_from_which_readers_learn() -> None:
    paths, kept = draw_ideas.step()
    best = paths[0]
    assert kept[:-1] != best[: len(kept) - 1]  # the tree holds more than the best path does
    assert kept[:-1] in [path[: len(kept) - 1] for path in paths]
    assert kept == list(draw_ideas.WRITES)


@pytest.mark.parametrize("page", ["README.md", "docs/decoding.md", "docs/early-exit.md"])
def test_pages_show_both_themes(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    pictures = re.findall(r"<picture>(.*?)</picture>", text, re.DOTALL)
    assert pictures
    for picture in pictures:
        dark, light = re.findall(r'src(?:set)?="([^"]+)"', picture)
        assert 'media="(prefers-color-scheme: dark)"' in picture
        assert (dark, light) == (light.replace("-light", "-dark"), light)
        assert (ROOT / page).parent.joinpath(light).resolve() in DRAWN
        assert re.search(r'alt="[^"]+"', picture)
