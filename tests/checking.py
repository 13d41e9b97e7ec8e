"""Annotations of the package checked on each call, as far as that is worth its time: shapes by jaxtyping, types by
beartype.

A check costs more than most functions do, and one that is called a thousand times in a test has arguments of the same
kinds nearly every time. So the first calls of each function in each test are checked, and what checks a function is
made when it is called for the first time.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping

# the hook takes an expression; with the tower an int is a float, as PEP 484 has it
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
CALLS = 20
"""Of one function in one test."""

_seen: Counter[Any] = Counter()
_jaxtyped: Any = jaxtyping.jaxtyped


def install() -> None:
    """Before the package is imported."""
    jaxtyping.jaxtyped = _limited
    jaxtyping.install_import_hook("zerodraft", CHECKER)


def begin() -> None:
    """A test begins."""
    _seen.clear()


def _limited(*, typechecker: Any) -> Callable[[Any], Any]:
    checked = _jaxtyped(typechecker=typechecker)

    def decorate(function: Any) -> Any:
        if isinstance(function, type) or not hasattr(function, "__code__"):
            return checked(function)
        inside = functools.cache(functools.partial(checked, function))
        code = function.__code__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _seen[code] >= CALLS:
                return function(*args, **kwargs)
            _seen[code] += 1
            return inside()(*args, **kwargs)

        return call

    return decorate
