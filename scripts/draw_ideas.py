"""Draws one figure for each idea, as SVG for light and for dark pages: docs/figures/idea-NAME-THEME.svg.

    python scripts/draw_ideas.py

The step of DiffuSpec is one that `decoding/idea.py` takes over a small lattice. The zero tokens' masses are made up.
"""

import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from zerodraft.decoding.idea import search, verify

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """The colours of a figure."""

    ink: str
    soft: str
    line: str
    panel: str
    box: str
    accent: str
    good: str
    bad: str


THEMES = {
    "light": Theme(
        ink="#1f2328",
        soft="#59636e",
        line="#b7bfc8",
        panel="#f3f5f8",
        box="#ffffff",
        accent="#8250df",
        good="#1a7f37",
        bad="#cf222e",
    ),
    "dark": Theme(
        ink="#e6edf3",
        soft="#9aa4af",
        line="#4b535d",
        panel="#191f27",
        box="#262d36",
        accent="#b392f0",
        good="#56d364",
        bad="#ff7b72",
    ),
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """Elements of an SVG, in the order in which they cover each other."""

    width: int
    height: int
    theme: Theme
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str = "none", dashes: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="{line}" '
            f'stroke-width="1.5" stroke-dasharray="{dashes}"/>'
        )

    def text(self, x: float, y: float, text: str, *, colour: str = "", at: str = "middle", size: int = 15) -> None:
        """A line of text; `**text**` is bold."""
        bold = ' font-weight="600"' if text.startswith("**") else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour or self.theme.ink}" text-anchor="{at}" font-size="{size}"{bold}>'
            f"{escape(text.strip('*'))}</text>"
        )

    def path(self, d: str, colour: str, *, width: float = 1.5, dashes: str = "none", arrow: bool = False) -> None:
        end = f' marker-end="url(#{colour[1:]})"' if arrow else ""
        self.parts.append(
            f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-dasharray="{dashes}"{end}/>'
        )

    def svg(self, title: str) -> str:
        heads = "".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for colour in (self.theme.ink, self.theme.soft, self.theme.accent, self.theme.good)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(title)}</title>\n<defs>{heads}</defs>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


MASSES = {"The": (0.62,), "fox": (0.21, 0.58), "jumps": (0.08, 0.17, 0.33), "over": (0.27, 0.71)}
"""The zero tokens' mass by token, in the cycles that it takes."""
NEXT = ("fox", "jumps", "over", "the")
THRESHOLD, CYCLES = 0.5, 3


def looped_model(theme: Theme) -> str:
    """Head, three cycles of the shared layers with their zero tokens, tail; four tokens, each with its own depth."""
    out = Drawing(800, 430, theme)
    columns, wide = (212, 350, 488), 100
    out.box(192, 8, 416, 366, theme.panel, theme.line)
    out.text(400, 32, "**shared layers: the same weights in every cycle**")
    for cycle, x in enumerate(columns, 1):
        middle = x + wide / 2
        out.box(middle - 30, 58, 60, 32, theme.box, theme.accent)
        out.text(middle, 79, f"key {cycle}", colour=theme.accent)
        out.path(f"M{middle:g} 90V114", theme.accent, arrow=True)
        out.text(middle, 134, f"**cycle {cycle}**")
        if cycle < CYCLES:
            out.path(f"M{middle + 36:g} 129H{middle + 138 - 38:g}", theme.soft, arrow=True)
    out.text(182, 71, "zero token:", colour=theme.accent, at="end", size=14)
    out.text(182, 89, "a key per cycle, value 0", colour=theme.accent, at="end", size=14)
    for x, name in ((132, "head"), (656, "tail")):
        out.text(x, 120, f"**{name}**")
        out.text(x, 138, "once", colour=theme.soft, size=14)
    for row, (token, masses) in enumerate(MASSES.items()):
        y = 150 + 56 * row
        middle = y + 20
        out.text(70, middle + 5, token, at="end")
        out.path(f"M78 {middle}H98", theme.ink, arrow=True)
        out.box(102, y, 60, 40, theme.box, theme.line)
        out.path(f"M162 {middle}H{columns[0] - 4}", theme.ink, arrow=True)
        for cycle, (x, mass) in enumerate(zip(columns, masses, strict=False), 1):
            leaves = mass >= THRESHOLD
            out.box(x, y, wide, 40, theme.box, theme.good if leaves else theme.line)
            out.text(x + wide / 2, y + 17, f"mass {mass:.2f}", size=14)
            out.box(x + 10, y + 25, 80, 7, theme.panel, theme.line)
            out.box(x + 10, y + 25, 80 * mass, 7, theme.accent)
            out.path(f"M{x + 10 + 80 * THRESHOLD:g} {y + 22}v13", theme.ink)
            if not leaves and cycle < CYCLES:
                out.path(f"M{x + wide} {middle}H{columns[cycle] - 4}", theme.ink, arrow=True)
        for x in columns[len(masses) :]:
            out.box(x, y, wide, 40, "none", theme.line, "4 4")
        left = columns[len(masses) - 1] + wide
        early = masses[-1] >= THRESHOLD
        out.path(f"M{left} {middle}H622", theme.good if early else theme.ink, width=2 if early else 1.5, arrow=True)
        out.box(626, y, 60, 40, theme.box, theme.line)
        out.path(f"M686 {middle}H706", theme.ink, arrow=True)
        out.text(714, middle + 5, NEXT[row], at="start")
    out.text(400, 400, "mass: the share of a token's attention that lands on the zero token", colour=theme.soft)
    out.text(400, 420, "at the threshold (tick) the token exits: it skips its remaining cycles", colour=theme.good)
    return out.svg("A Zero Token Transformer: head, cycles of shared layers with zero tokens, early exits, tail")


WORDS = ("The", "cat", "sat", "on", "down", "by", "the", "a", "mat", "sofa", "rug", ".", "and", ",")
TEXT = ("The", "cat", "sat")
LATTICE = (
    {"on": 0.56, "down": 0.31, "by": 0.13},
    {"the": 0.58, "on": 0.29, "a": 0.13},
    {"mat": 0.47, "sofa": 0.35, "the": 0.18},
    {".": 0.52, "and": 0.33, ",": 0.15},
)
PAIRS = {
    ("sat", "on"): 0.5,
    ("sat", "down"): 0.4,
    ("on", "the"): 0.8,
    ("down", "on"): 0.6,
    ("down", "the"): 0.1,
    ("the", "mat"): 0.4,
    ("the", "sofa"): 0.35,
    ("mat", "."): 0.5,
    ("sofa", "."): 0.3,
    ("sofa", "and"): 0.5,
}
"""What a small causal model makes of neighbours; all others are unlikely."""
WRITES = ("on", "the", "sofa", ",")
"""The tokens of the target."""


def step(beam: int = 3, tau: float = 0.8) -> tuple[list[list[str]], list[str]]:
    """The paths that the search finds in the lattice, best first, and the tokens that are kept."""

    def drafted() -> Tensor:
        q = torch.full((len(LATTICE), len(WORDS)), 1e-9)
        for row, candidates in zip(q, LATTICE, strict=True):
            for word, chance in candidates.items():
                row[WORDS.index(word)] = chance
        return q.log()

    def proxy(text: list[int]) -> Tensor:
        return torch.tensor([PAIRS.get((WORDS[text[-1]], word), 0.01) for word in WORDS]).log()

    def target(text: list[int]) -> Tensor:
        return torch.tensor([float(word == WRITES[len(text) - len(TEXT)]) for word in WORDS])

    text = [WORDS.index(word) for word in TEXT]
    paths = search(drafted(), text, proxy, beam=beam, tau=tau)
    tree = {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}
    kept = verify(target, text, tree)
    return [[WORDS[token] for token in path] for path in paths], [WORDS[token] for token in kept]


WIDE = 80
"""Of a candidate, in pixels; positions are 94 apart."""


def diffuspec_step(theme: Theme) -> str:
    """Text and masks; the lattice with its paths; the tree with what the target accepts; what is kept."""
    paths, kept = step()
    out = Drawing(800, 368, theme)
    out.box(8, 8, 784, 62, theme.panel, theme.line)
    out.text(22, 44, "**1 draft**", at="start")
    for place, word in enumerate((*TEXT, *"????")):
        dashes = "none" if place < len(TEXT) else "4 4"
        chip(out, 100 + 66 * place, 24, word, line=theme.line, dashes=dashes, wide=58)
    out.text(778, 36, "the drafter fills all", colour=theme.soft, at="end", size=14)
    out.text(778, 55, "masks in one pass", colour=theme.soft, at="end", size=14)
    lattice(out, paths)
    tree(out, paths, kept)
    out.box(8, 298, 784, 62, theme.panel, theme.line)
    out.text(22, 334, "**4 keep**", at="start")
    lines = [theme.line] * len(TEXT) + [theme.good] * (len(kept) - 1) + [theme.accent]
    for place, (word, line) in enumerate(zip((*TEXT, *kept), lines, strict=True)):
        chip(out, 100 + 66 * place, 314, word, line=line, wide=58)
    out.text(778, 326, f"{len(kept)} tokens from one pass:", colour=theme.soft, at="end", size=14)
    out.text(778, 345, "the last is the target's own", colour=theme.accent, at="end", size=14)
    return out.svg(
        "A step of DiffuSpec: draft a lattice, search paths, verify their tree, keep what the target accepts"
    )


def chip(
    out: Drawing, x: float, y: float, text: str, *, line: str, dashes: str = "none", colour: str = "", wide: int = WIDE
) -> None:
    out.box(x, y, wide, 30, out.theme.box, line, dashes)
    out.text(x + wide / 2, y + 20, text, colour=colour, size=14)


def lattice(out: Drawing, paths: list[list[str]], left: int = 8) -> None:
    """Candidates by position; those on a path are linked, those that the search did not look at are dashed."""
    theme = out.theme
    out.box(left, 80, 386, 208, theme.panel, theme.line)
    out.text(left + 14, 104, "**2 search**", at="start")
    out.text(left + 372, 104, "likely paths that read well", colour=theme.soft, at="end", size=14)
    x = [left + 12 + 94 * place for place in range(len(LATTICE))]
    y = [[122 + 54 * row for row in range(len(candidates))] for candidates in LATTICE]

    def height(place: int, word: str) -> int:
        return y[place][list(LATTICE[place]).index(word)]

    for place, before, word in sorted({(n, p[n - 1], p[n]) for p in paths for n in range(1, len(p))}):
        start, end = height(place - 1, before) + 15, height(place, word) + 15
        best = paths[0][place - 1 : place + 1] == [before, word]
        out.path(f"M{x[place - 1] + WIDE} {start}L{x[place]} {end}", theme.accent, width=3 if best else 1.5)
    for place, candidates in enumerate(LATTICE):
        for word, chance in candidates.items():
            used = any(path[place] == word for path in paths)
            line, colour = (theme.accent, "") if used else (theme.line, theme.soft)
            label = f"{word}  {chance:.0%}"
            chip(out, x[place], height(place, word), label, line=line, colour=colour, dashes="none" if used else "4 4")


def tree(out: Drawing, paths: list[list[str]], kept: list[str], left: int = 406) -> None:
    """The paths with their beginnings shared, and which of them the target wrote itself."""
    theme = out.theme
    out.box(left, 80, 386, 208, theme.panel, theme.line)
    out.text(left + 14, 104, "**3 verify**", at="start")
    out.text(left + 372, 104, "the target reads the tree in one pass", colour=theme.soft, at="end", size=14)
    leaves = sorted(tuple(path) for path in paths)
    nodes = {leaf[:n] for leaf in leaves for n in range(1, len(leaf) + 1)}

    def place(node: tuple[str, ...]) -> tuple[int, float]:
        rows = [row for row, leaf in enumerate(leaves) if leaf[: len(node)] == node]
        return left + 12 + 94 * (len(node) - 1), 122 + 54 * math.fsum(rows) / len(rows)

    for node in sorted(nodes):
        (x, y), accepted = place(node), node == tuple(kept[: len(node)])
        *before, word = node
        line = theme.good if accepted else theme.bad
        if before:
            above = place(tuple(before))
            out.path(f"M{above[0] + WIDE} {above[1] + 15:g}L{x} {y + 15:g}", line, width=3 if accepted else 1.5)
        chip(out, x, y, f"{word} {'✓' if accepted else '✗'}", line=line, dashes="none" if accepted else "4 4")


FIGURES_BY_NAME = {"looped-model": looped_model, "diffuspec-step": diffuspec_step}


def figures() -> dict[Path, str]:
    """All figures by their paths."""
    return {
        FIGURES / f"idea-{name}-{theme}.svg": draw(colours)
        for name, draw in FIGURES_BY_NAME.items()
        for theme, colours in THEMES.items()
    }


if __name__ == "__main__":
    for path, svg in figures().items():
        path.write_text(svg, encoding="utf-8")
