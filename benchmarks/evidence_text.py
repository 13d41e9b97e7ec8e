"""Cells and tables in Markdown, for the page of evidence."""

from collections.abc import Sequence

from evidence_statistics import Estimate


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in (header, *rows)
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]]) + "\n"


def interval(value: Estimate | None, digits: int = 4) -> str:
    """A mean with its interval, as far as there are any."""
    if value is None:
        return "-"
    mean = f"{value.mean:.{digits}f}"
    return mean if value.count < 2 else f"{mean} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
