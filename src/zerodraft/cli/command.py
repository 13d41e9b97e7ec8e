"""What a command is: a frozen dataclass whose fields are its flags, and whose `run` calls the library and reports.

The same dataclass gives the parser (`flags`) and the help (`help`): field types say which values fit, the docstring
under a field is its help text, the class docstring says what the command does.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from rich.console import Console

Result = dict[str, Any]
"""What a command measured or made, in JSON types; `--json` prints it."""


def positional(metavar: str, *, also: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """A field that is given by its place instead of by a flag, or by one of the flags `also`; `kwargs` are those of
    `dataclasses.field`."""
    return dataclasses.field(metadata={"metavar": metavar, "also": also}, **kwargs)


def metavar(name: str, *, also: tuple[str, ...] = (), **kwargs: Any) -> Any:
    """A flag whose value is called `name` in the help, with other names `also`; `kwargs` are those of
    `dataclasses.field`."""
    return dataclasses.field(metadata={"value": name, "also": also}, **kwargs)


def each(name: str, **kwargs: Any) -> Any:
    """A flag for several values that takes one each time it is given; `name` and `kwargs` as for `metavar`."""
    return dataclasses.field(metadata={"value": name, "each": True}, **kwargs)


def explained(doc: str, **kwargs: Any) -> Any:
    """A flag whose help text is made, not written under it; `kwargs` are those of `dataclasses.field`."""
    return dataclasses.field(metadata={"doc": doc}, **kwargs)


def overrides_of(*sources: type) -> Any:
    """A field that collects the flags of other dataclasses (recipes) that were given, as `{"section.key": value}`; what
    several have is one flag, with the default of the first."""
    return dataclasses.field(default_factory=dict, metadata={"sources": sources})


def settings_of(source: type) -> Any:
    """A field that holds another dataclass, whose fields are flags of the command's own: `--key`, not `--field.key`."""
    return dataclasses.field(default_factory=source, metadata={"flat": True})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(ABC):
    """Base of all commands."""

    example: ClassVar[str]
    """A command line that works, for the help."""

    json: bool = False
    """Print one JSON object on stdout, all else on stderr."""

    def check(self) -> None:  # noqa: B027  # most commands have nothing to check ahead
        """Raises ZerodraftError for bad input that can be told without torch, so that it is told at once."""

    @abstractmethod
    def run(self, console: Console) -> Result:
        """Does the work and writes for people on `console`; raises ZerodraftError for bad input."""
