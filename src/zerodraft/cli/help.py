"""Help texts, made from the dataclasses that the commands are: one line a flag, one screen a command.

A recipe has more keys than a screen has lines; its command shows them by section with their values, and `--help-all`
explains each of them.
"""

import ast
import dataclasses
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

from zerodraft.cli.flags import Flag, flags_of

if TYPE_CHECKING:
    from zerodraft.cli.command import Command

WIDTH = 100
COLUMN = 32
"""Where the explanations start."""
INDENT = 16
"""Where the keys of a section start, behind its name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sketch:
    """What the source of a command says about it, without the imports that the module itself would cost."""

    summary: str
    """The first line of the docstring."""
    example: str

    @classmethod
    def of(cls, source: str, name: str) -> "Sketch":
        """The class `name` in a module's source."""
        body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
        examples = (
            ast.literal_eval(part.value)
            for part in body.body
            if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "example" and part.value
        )
        return cls((ast.get_docstring(body) or "").split("\n")[0], next(examples, ""))


def overview(commands: dict[str, Sketch]) -> str:
    """The text of `zerodraft --help`."""
    lines = [
        "usage: zerodraft COMMAND [...]",
        "",
        "Zero Token Transformers (layers reused in cycles) and lossless decoding with drafts (DiffuSpec).",
        "",
        "commands",
        *_summaries(commands),
        "",
        "  zerodraft COMMAND --help explains a command; zerodraft --version tells the version.",
        "",
        f"example: {commands['generate'].example}",
        "",
        "Exit codes: 0 done, 1 failed, 2 bad input.",
    ]
    return "\n".join(lines)


def family_help(word: str, commands: dict[str, Sketch]) -> str:
    """The text of `zerodraft WORD --help` where commands of two words begin with it."""
    lines = [
        f"usage: zerodraft {word} {'|'.join(name.split()[1] for name in commands)} [...]",
        "",
        *_summaries(commands),
        "",
        f"  zerodraft {word} COMMAND --help explains one of them.",
    ]
    return "\n".join(lines)


def _summaries(commands: dict[str, Sketch]) -> list[str]:
    width = max(map(len, commands)) + 2
    return [f"  {name:<{width}}{command.summary}" for name, command in commands.items()]


def command_help(name: str, cls: "type[Command]", *, complete: bool = False) -> str:
    """The text of `zerodraft NAME --help`, or of `--help-all` when `complete`."""
    flags = flags_of(cls)
    own = [flag for flag in flags if flag.collector is None]
    collected = [flag for flag in flags if flag.collector is not None]
    places = [flag for flag in own if flag.positional]
    usage = " ".join(
        [f"usage: zerodraft {name}"]
        + [flag.metavar if flag.default is dataclasses.MISSING else f"[{flag.metavar}]" for flag in places]
        + (["[--SECTION.KEY VALUE ...]"] if collected else [])
        + ["[flags]"]
    )
    lines = [usage, "", *_prose(cls.__doc__ or ""), "", *_wrap(f"example: {cls.example}", 9), ""]
    lines += [line for flag in sorted(own, key=_order) for line in _explain(flag)]
    lines += _row("-h, --help", "Show this text.")
    if collected:
        lines += _row("--help-all", "Explain every key.")
        lines += ["", "recipe keys and their defaults (YAML: KEY under SECTION; here: --SECTION.KEY VALUE)"]
        for section, members in _sections(collected).items():
            if complete:
                lines += ["", f"[{section}]", *(line for flag in members for line in _explain(flag))]
            else:
                lines += _compact(section, members)
    return "\n".join(lines)


def _order(flag: Flag) -> tuple[bool, bool]:
    # places first; --json, which every command has, last
    return (not flag.positional, flag.key == "json")


def _sections(flags: list[Flag]) -> dict[str, list[Flag]]:
    sections: dict[str, list[Flag]] = {}
    for flag in flags:
        sections.setdefault(flag.key.rpartition(".")[0] or "recipe", []).append(flag)
    return sections


def _compact(section: str, flags: list[Flag]) -> list[str]:
    shown = []
    for flag in flags:
        key, default = flag.key.rpartition(".")[2].replace("_", "-"), _default(flag.default)
        shown.append(f"{key}={default}" if default else key)
    text = textwrap.wrap(" ".join(shown), WIDTH - 2 - INDENT, break_on_hyphens=False, break_long_words=False)
    return [f"  {section if i == 0 else '':<{INDENT}}{line}" for i, line in enumerate(text)]


def _explain(flag: Flag) -> list[str]:
    if flag.positional:
        left = flag.metavar
    elif flag.hint is bool:
        left = flag.both if flag.default is True else flag.name
    else:
        left = f"{flag.name} {flag.metavar}"
    doc, default = flag.doc, _default(flag.default)
    if flag.default is dataclasses.MISSING and not flag.positional:
        doc = f"{doc} (required)"
    elif flag.hint is bool:
        doc = f"{doc} [on]" if flag.default is True else doc
    elif default:
        doc = f"{doc} [{default}]"
    return _row(left, doc)


def _row(left: str, doc: str) -> list[str]:
    text = textwrap.wrap(doc, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    if len(left) + 4 > COLUMN:
        return [f"  {left}", *(" " * COLUMN + line for line in text)]
    return [f"  {left:<{COLUMN - 2}}{text[0]}", *(" " * COLUMN + line for line in text[1:])]


def _default(value: Any) -> str:
    if value is dataclasses.MISSING or value is None or value in ("", (), {}):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, str) and (" " in value or not value.isprintable()) else str(value)


def _prose(doc: str) -> list[str]:
    """A docstring, rewrapped to the width of the help."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        lines += ["", *_wrap(" ".join(paragraph.split()), 0)]
    return lines[1:]


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
