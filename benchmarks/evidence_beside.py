"""The sections of the page that other scripts measure for: which there are, and their results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import evidence_domain
import evidence_exits
import evidence_mechanism
import evidence_tasks
import evidence_windows
from evidence_domain import Domains
from evidence_exits import ExitTable
from evidence_mechanism import Mechanisms
from evidence_plan import OfRun
from evidence_table import Beside, Look, Table, read_result
from evidence_tasks import TaskTable
from evidence_windows import WindowTable

NOT_MEASURED = "Not measured yet.\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of results with a section of the page."""

    result: type[Beside]
    head: str
    """What the section begins with."""
    section: Callable[[Any], Iterator[str]]
    """Its part about one result."""
    draw: Callable[[Any, Path], None] | None = None
    """Draws a result's figures beside the page."""
    at_best_rates: bool = False
    """Whether arms are shown at their best rates: not at those that lost a run."""


KINDS = (
    Kind(
        result=Mechanisms,
        head=evidence_mechanism.HEAD,
        section=evidence_mechanism.section,
        draw=evidence_mechanism.draw_masses,
        at_best_rates=True,
    ),
    Kind(result=Domains, head=evidence_domain.HEAD, section=evidence_domain.section, at_best_rates=True),
    Kind(result=ExitTable, head=evidence_exits.HEAD, section=evidence_exits.section, draw=evidence_exits.draw_exits),
    Kind(result=WindowTable, head=evidence_windows.HEAD, section=evidence_windows.section),
    Kind(result=TaskTable, head=evidence_tasks.HEAD, section=evidence_tasks.section),
)
"""In the order of the page."""

Found = Mapping[type[Beside], Sequence[Any]]
"""Results by their kind."""


def files_beside(folder: Path) -> set[Path]:
    """The files in a folder that hold such results."""
    return {path for kind in KINDS for path in folder.glob(kind.result.file("*"))}


def read_beside(folder: Path, tables: Mapping[str, Table]) -> Found:
    """All such results in a folder; where best rates are shown, without those that lost a run of the arm.

    Raises:
        ZerodraftError: one is damaged.
    """
    found: dict[type[Beside], Sequence[Any]] = {}
    for kind in KINDS:
        results = [read_result(kind.result, path) for path in sorted(folder.glob(kind.result.file("*")))]
        found[kind.result] = list(counting(results, tables)) if kind.at_best_rates else results
    return found


def counting(looks: Sequence[Any], tables: Mapping[str, Table]) -> Iterator[Look]:
    """What was found in runs at rates that an arm may be shown at."""
    for look in looks:
        kept = tuple(counting_results(look, tables.get(look.table)))
        if kept:
            yield replace(look, results=kept)


def counting_results(look: Look, table: Table | None) -> Iterator[OfRun]:
    """Those of one table."""
    for found in look.results:
        if table is None or found.rate not in table.rates_lost(found.arm):
            yield found


def sections(found: Found) -> Iterator[str]:
    """All of them, in the order of the page."""
    for kind in KINDS:
        parts = [kind.section(result) for result in found.get(kind.result, ())]
        yield from (kind.head, *(chain.from_iterable(parts) if parts else [NOT_MEASURED]))


def draw(found: Found, page: Path) -> None:
    """Their figures, beside the page."""
    for kind in KINDS:
        for result in found.get(kind.result, ()):
            if kind.draw is not None:
                kind.draw(result, page)
