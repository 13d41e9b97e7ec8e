"""Where commands write for people: text is taken literally, whatever it holds.

Model output, paths and names may hold square brackets, which rich would read as markup, or control characters, which a
terminal would obey. Colours are asked for by `rich.text.Text` and styles alone. What goes into a file or a pipe is left
as it is.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from zerodraft.common.errors import printable

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but line feed and tab."""


class LiteralConsole(Console):
    """A console without markup, emoji codes and highlighting; on a terminal control characters show as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What rich makes of it, with nothing left that steers the terminal but rich's own colours and moves."""
        for segment in super().render(renderable, options):
            if self.is_terminal and segment.control is None and CONTROLS.search(segment.text):
                segment = segment._replace(text=CONTROLS.sub(lambda found: printable(found[0]), segment.text))
            yield segment
