"""The one exception type for mistakes that a user can mend: one clear sentence, which the CLI shows as it is."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ZerodraftError(ValueError):
    """Bad input: the message names the value, says what was expected and what to do about it."""


@contextmanager
def reading(what: str, outcome: str = "could not be loaded", *, ours: bool = False) -> Iterator[None]:
    """Around another library's reading of a user's file: whatever it raises becomes one sentence.

    Libraries raise all kinds over a damaged file (`TypeError`, `IndexError`, `ZeroDivisionError`, a panic of Rust code,
    which is no `Exception`), so all are caught; mistakes of ours would be hidden too, so none of our code belongs here.

    Args:
        what: The subject of the sentence, such as "The tokenizer in 'x'".
        outcome: Its verb.
        ours: Put both before sentences of ours too, from code of ours that reads the file and does not know its name.
    """
    try:
        yield
    except ZerodraftError as error:
        if not ours:
            raise
        raise ZerodraftError(f"{what} {outcome}: {error}") from error.__cause__
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ZerodraftError(f"{what} {outcome}: {why(error)}.") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Around the writing of an output: what the system says against it becomes one sentence (a full disk, a folder that
    takes no files). All other errors are mistakes of ours, and stay what they are."""
    try:
        yield
    except Exception as error:
        torn = any(sign in str(error) for sign in TORN)
        if not torn and not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = "the disk is full" if torn else why(error)
        raise ZerodraftError(f"{what} could not be written: {reason}.") from error


TORN = ("inline_container", "iostream")
"""What torch says where a file could not be written to its end; safetensors tells the system's error as text."""


def why(error: BaseException) -> str:
    """The first line of an error's message without its last stop, or what else the error tells."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is missing"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run here"
    if "Weights only load failed" in str(error):
        return "its pickled weights are damaged or hold more than tensors; save the model as safetensors"
    # "Validation error for field 'x':" is followed by what is wrong with it
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, (ArithmeticError, AttributeError, IndexError, TypeError, AssertionError)):
        # "integer modulo by zero" alone tells little
        text = f"a value in it does not fit ({type(error).__name__}: {text})"
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}...").rstrip(".: ")


LONGEST = 400
"""Characters of another library's message that are shown."""


def printable(text: str) -> str:
    """The text with everything that a terminal might obey, or cannot show, as an escape: `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` when something close exists, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"
