"""From a dataclass to command-line flags and back: `--training.steps 10` sets the field `steps` of `training`.

argparse splits the words; the values take the same way as those of a YAML recipe (`training.strict`), so that a flag
and a key accept the same values and fail with the same sentence.
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from zerodraft.common.errors import ZerodraftError, did_you_mean
from zerodraft.training.recipe import parse_yaml
from zerodraft.training.strict import from_mapping

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One value that can be set on the command line."""

    key: str
    """Dotted name, as it is typed."""
    path: str
    """Dotted path of the field; other than `key` where fields of a nested dataclass are flags without its name."""
    hint: Any
    """Its annotation."""
    default: Any
    """Its default; `dataclasses.MISSING` when it has to be given."""
    doc: str
    """The docstring under the field."""
    metavar: str
    """What its value is called."""
    positional: bool
    """Given by place, not by name."""
    collector: str | None
    """The field that collects it, for flags of a recipe."""
    each: bool = False
    """Takes one of several values each time it is given, so that a word behind it is no value."""
    also: tuple[str, ...] = ()
    """Other names: what is the target for one command is the model for another."""

    @property
    def name(self) -> str:
        """The flag as it is typed: `--training.steps`."""
        return "--" + self.key.replace("_", "-")

    @property
    def both(self) -> str:
        """The flag of a boolean that is on unless it is switched off: `--training.[no-]bf16`."""
        section, dot, last = self.key.replace("_", "-").rpartition(".")
        return f"--{section}{dot}[no-]{last}"

    @property
    def negation(self) -> str:
        """The flag that switches a boolean off: `--training.no-bf16`."""
        section, dot, last = self.key.replace("_", "-").rpartition(".")
        return f"--{section}{dot}no-{last}"


def flags_of(cls: type, prefix: str = "", collector: str | None = None, inside: str = "") -> list[Flag]:
    """All flags of a dataclass, with those of nested dataclasses and collected recipes, in the order of the source."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    flags = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if sources := field.metadata.get("sources"):
            merged: dict[str, Flag] = {}
            for flag in (flag for source in sources for flag in flags_of(source, prefix, field.name, inside)):
                merged.setdefault(flag.key, flag)
            flags += merged.values()
        elif dataclasses.is_dataclass(hint):
            nested = prefix if field.metadata.get("flat") else f"{prefix}{field.name}."
            flags += flags_of(hint, nested, collector, f"{inside}{field.name}.")  # type: ignore[arg-type]  # a type
        else:
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            place = field.metadata.get("metavar")
            flags.append(
                Flag(
                    key=prefix + field.name,
                    path=inside + field.name,
                    hint=hint,
                    default=default,
                    doc=field.metadata.get("doc") or docs.get(field.name, ""),
                    metavar=place or field.metadata.get("value") or _metavar(hint),
                    positional=place is not None,
                    collector=collector,
                    each=field.metadata.get("each", False),
                    also=field.metadata.get("also", ()),
                )
            )
    return flags


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings under the fields of `cls` and of its bases, by field name."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for statement, following in pairwise(body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def parse(cls: type[T], words: Sequence[str], command: str) -> T:
    """Builds the command `cls` from the words after its name.

    Raises:
        ZerodraftError: an unknown flag (with a suggestion), a value that does not fit, or one too many or too few.
    """
    flags = flags_of(cls)
    named = {flag.name: flag for flag in flags if not flag.positional}
    words, literal = _split_at_separator(words)
    words, placed = _renamed([_normalise(word) for word in words], flags)
    parser = _Parser(prog=command, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in named.values():
        _add(parser, flag)
    keyed = dict(_keyed_flags(named, words))
    for name in keyed:
        parser.add_argument(name, dest=name)
    given, rest = parser.parse_known_args(words)
    # as argparse sees it too, a word with a space is a text
    unknown = [word for word in rest if word.startswith("-") and len(word) > 1 and " " not in word]
    if unknown:
        name = unknown[0].split("=")[0]
        known = [*named, *(flag.negation for flag in named.values() if flag.hint is bool)]
        raise ZerodraftError(f"unknown flag '{name}'{_suggest(name, known, command)}")

    values: dict[str, Any] = {}
    for flag in named.values():
        if flag.key in vars(given):
            _store(values, flag, "", _value(flag.hint, getattr(given, flag.key)))
    for name, (flag, key) in keyed.items():
        _store(values, flag, f".{key}", _yaml(getattr(given, name)))

    places = [flag for flag in flags if flag.positional]
    given_words: list[Any] = [*placed, *(word for word in rest if word != "--"), *literal]
    if places and get_origin(places[-1].hint) is tuple:
        # the last place takes all the words that are left
        given_words[len(places) - 1 :] = [given_words[len(places) - 1 :]] if len(given_words) >= len(places) else []
    if len(given_words) > len(places):
        extra = given_words[len(places)]
        raise ZerodraftError(f"unexpected word '{extra}' (for a text of several words, put it in quotes)")
    values.update(zip((flag.key for flag in places), given_words, strict=False))
    for flag in places:
        if flag.default is dataclasses.MISSING and flag.key not in values:
            raise ZerodraftError(f"{flag.metavar} is missing; see 'zerodraft {command} --help'")
    for flag in named.values():
        if flag.default is dataclasses.MISSING and flag.collector is None and flag.key not in vars(given):
            raise ZerodraftError(f"{flag.name} is missing; see 'zerodraft {command} --help'")
    return from_mapping(cls, values)


def _store(values: dict[str, Any], flag: Flag, key: str, value: Any) -> None:
    """Own fields are nested as the dataclass is; a recipe's keep their dotted keys, to be laid over a file. `key` is
    what comes after the flag's: an entry of a mapping."""
    if flag.collector is not None:
        values.setdefault(flag.collector, {})[flag.key + key] = value
        return
    *sections, last = (flag.path + key).split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


class _Parser(argparse.ArgumentParser):
    """argparse with our kind of error."""

    def error(self, message: str) -> NoReturn:
        raise ZerodraftError(message.removeprefix("argument "))


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    if flag.hint is bool:
        parser.add_argument(flag.name, dest=flag.key, action="store_const", const="true")
        parser.add_argument(flag.negation, dest=flag.key, action="store_const", const="false")
    elif flag.each:
        parser.add_argument(flag.name, dest=flag.key, action="append")
    elif any(get_origin(option) is tuple for option in options(flag.hint)):
        # given again, it adds to what was given before
        parser.add_argument(flag.name, dest=flag.key, nargs="*", action="extend")
    else:
        parser.add_argument(flag.name, dest=flag.key)


def _keyed_flags(named: dict[str, Flag], words: Sequence[str]) -> Iterator[tuple[str, tuple[Flag, str]]]:
    """Flags such as `--model.ztt.zero_rope`, whose last part is a key of the free mapping `model.ztt`."""
    mappings = [flag for flag in named.values() if get_origin(flag.hint) is dict]
    for word in words:
        name = word.split("=")[0]
        for flag in mappings:
            if name.startswith(flag.name + ".") and name not in named:
                yield name, (flag, name.removeprefix(flag.name + ".").replace("-", "_"))


def _split_at_separator(words: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(words)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _renamed(words: Sequence[str], flags: Sequence[Flag]) -> tuple[list[str], list[str]]:
    """The words with every flag by its own name; and the values of flags that stand for the first place."""
    names = {f"--{name}": flag for flag in flags for name in flag.also}
    renamed: list[str] = []
    placed: list[str] = []
    left = list(words)
    while left:
        name, equals, value = (word := left.pop(0)).partition("=")
        if name not in names:
            renamed.append(word)
        elif not names[name].positional:
            renamed.append(names[name].name + equals + value)
        elif equals or left:
            placed.append(value if equals else left.pop(0))
        else:
            raise ZerodraftError(f"{name}: expected one argument")
    return renamed, placed


def _normalise(word: str) -> str:
    """`--max_steps` and `--max-steps` are the same flag; values keep their underscores."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _suggest(name: str, known: Sequence[str], command: str) -> str:
    hint = did_you_mean(name, known)
    return hint if "did you mean" in hint else f"; see 'zerodraft {command} --help'"


def options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _value(hint: Any, given: Any) -> Any:
    """What a flag's words mean, as YAML would have given it; whether it fits is checked by `from_mapping`."""
    alternatives = options(hint)
    if isinstance(given, list):
        literals = [value for option in alternatives if get_origin(option) is Literal for value in get_args(option)]
        if len(given) == 1 and given[0] in literals:
            return given[0]
        items = next(get_args(option)[0] for option in alternatives if get_origin(option) is tuple)
        return [_value(items, word) for word in given]
    if type(None) in alternatives and given.lower() in ("none", "null"):
        return None
    if str in alternatives or any(get_origin(option) is Literal for option in alternatives):
        return given
    return _yaml(given)


def _yaml(text: str) -> Any:
    try:
        return parse_yaml(text, "a value")
    except ZerodraftError:
        return text


def _metavar(hint: Any) -> str:
    """What a value of this type is called in the help."""
    names = {int: "N", float: "X", str: "TEXT", bool: ""}
    shown = []
    for option in options(hint):
        if get_origin(option) is Literal:
            shown.append("{" + ",".join(map(str, get_args(option))) + "}")
        elif get_origin(option) is tuple:
            shown.append(f"{_metavar(get_args(option)[0])}...")
        elif get_origin(option) is dict:
            shown.append("{KEY: VALUE}")
        elif option is not type(None):
            shown.append(names.get(option, getattr(option, "__name__", str(option)).upper()))
    return "|".join(shown)
