"""Plain mappings (from YAML) into frozen dataclasses, strictly: what does not fit is answered in one clear sentence.

The dataclasses are the only description of what a recipe may hold: their annotations say which values fit, so there
is no second schema to keep in step.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from zerodraft.common.errors import ZerodraftError, did_you_mean

T = TypeVar("T")

LARGEST = (1 << 63) - 1
"""No size and no seed is larger, and other libraries fail over one that is."""

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 120
SHORT.maxlist = SHORT.maxdict = SHORT.maxtuple = 12


def from_mapping(cls: type[T], mapping: Any, where: str = "") -> T:
    """Builds the dataclass `cls` from `mapping`.

    Args:
        cls: a dataclass type; nested dataclasses are built from nested mappings.
        mapping: names to values, as YAML gives them; anything else is refused.
        where: dotted path of `mapping` inside the file, for error messages.

    Raises:
        ZerodraftError: an unknown key (with a suggestion), a missing one, or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ZerodraftError(f"'{where or cls.__name__}' must be a mapping of keys to values, got {shown(mapping)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    hints = get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ZerodraftError(f"unknown key '{path}'{did_you_mean(str(key), fields)}")
        # what is given without the name of its section is spoken of without it
        values[key] = _convert(hints[key], value, where if fields[key].metadata.get("flat") else path)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ZerodraftError(f"missing key '{f'{where}.{name}' if where else name}'")
    return cls(**values)


def check_least(section: str, instance: Any, **least: float) -> None:
    """Raises `ZerodraftError` for a field of `instance`, the recipe's `section`, that is below its least value."""
    for name, bound in least.items():
        if not getattr(instance, name) >= bound:
            raise ZerodraftError(f"{section}.{name} is {getattr(instance, name)}; it must be at least {bound}")


def to_mapping(instance: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`, made of JSON types only (tuples become lists)."""
    return {f.name: _plain(getattr(instance, f.name)) for f in dataclasses.fields(instance)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        errors = []
        for option in args:
            try:
                return _convert(option, value, where)
            except ZerodraftError as error:
                errors.append(str(error))
        raise ZerodraftError(errors[0] if len(errors) == 1 else f"'{where}' must be {_name(hint)}, got {shown(value)}")
    if origin is Literal:
        if value in args:
            return value
        hint_text = did_you_mean(str(value), map(str, args))
        raise ZerodraftError(f"'{where}' must be one of {', '.join(map(repr, args))}, got {shown(value)}{hint_text}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ZerodraftError(f"'{where}' must be a list, got {shown(value)}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ZerodraftError(f"'{where}' must be a mapping, got {shown(value)}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)  # type: ignore[arg-type]  # a type
    if hint is float:
        return _to_float(value, where)
    if hint is type(None):
        fits = value is None
    else:
        # bool is an int in Python, never in a recipe
        fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not fits:
        raise ZerodraftError(f"'{where}' must be {_name(hint)}, got {shown(value)}")
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ZerodraftError(f"'{where}' must be a whole number of at most {LARGEST}, got {shown(value)}")
    return value


def _to_float(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-3 (no dot) as a string
    if not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ZerodraftError(f"'{where}' must be a number, got {shown(value)}")


def _check_text(value: str, where: str) -> None:
    """What no file system and no tokenizer takes: a NUL, and halves of surrogate pairs other than those that stand for
    a byte of a command line that is no UTF-8."""
    try:
        fits = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ZerodraftError(f"'{where}' must be a text of whole characters without NUL, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in a message: as Python writes it, cut where it is long."""
    text = SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    return {tuple: "a list", dict: "a mapping"}.get(get_origin(hint), str(getattr(hint, "__name__", hint)))
