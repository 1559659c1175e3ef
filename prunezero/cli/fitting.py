"""How does a table fit into a narrow terminal, with every number whole?"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

from rich import table as rich_table
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

from prunezero.errors import printable

# The least width of a column of words that is still readable when its cells are folded.
_NARROWEST = 12
# Wider than any terminal.
_WIDEST = 10_000


class Table(rich_table.Table):
    """A table whose columns that stand to the right hold numbers, which are never cut.

    Spare columns are left out first, then words are folded. Where that is not enough, each row
    becomes lines of its own, a heading and a value in each. Cells show what a terminal would obey,
    see `printable`.
    """

    def __init__(self, *, title: str | None = None, show_header: bool = True) -> None:
        shown = None if title is None else Text(printable(title))
        super().__init__(title=shown, title_justify="left", show_header=show_header)
        self._spare: list[rich_table.Column] = []

    def add_column(  # type: ignore[override]
        self, header: RenderableType = "", *, is_spare: bool = False, **how: Any
    ) -> None:
        """As rich has it, but that words are folded and numbers stay whole.

        Args:
            is_spare: whether the table can do without it.
        """
        is_number = how.get("justify") == "right"
        super().add_column(header, **{"overflow": "fold", "no_wrap": is_number, **how})
        if is_spare:
            self._spare.append(self.columns[-1])

    def add_row(self, *cells: Any, **how: Any) -> None:
        """As rich has it, of texts."""
        super().add_row(*(printable(str(cell)) for cell in cells), **how)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich draws: the table, without spare columns, or the lines of its rows."""
        if self._spare and self._whole_width(console, options) > options.max_width:
            yield from self._without_spare().__rich_console__(console, options)
        elif self._least_width(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._stacked()

    def _whole_width(self, console: Console, options: ConsoleOptions) -> int:
        """Signs of the table in which nothing is folded."""
        wide = options.update(max_width=_WIDEST)
        return super().__rich_measure__(console, wide).maximum

    def _without_spare(self) -> Table:
        narrower = copy(self)
        narrower.columns = [one for one in self.columns if one not in self._spare]
        narrower._spare = []
        return narrower

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """What rich takes it for: whatever there is, since it fits into anything."""
        width = super().__rich_measure__(console, options)
        return width.clamp(max_width=options.max_width)

    def _least_width(self, console: Console, options: ConsoleOptions) -> int:
        """Signs of the narrowest table in which every number is whole."""
        # A bar and two blanks for each column, and the last bar.
        width = 1
        for column in self.columns:
            cells = [Measurement.get(console, options, cell).maximum for cell in column.cells]
            # A heading that is not folded has its lines as they are given.
            heads = Measurement.get(console, options, column.header)
            heading = heads.maximum if column.no_wrap else heads.minimum
            longest = max(cells, default=0)
            width += 3 + max(heading, longest if column.no_wrap else min(longest, _NARROWEST))
        return width

    def _stacked(self) -> Iterator[Text]:
        if self.title:
            yield Text(str(self.title), style="italic")
        words = [" ".join(str(column.header).split("\n")) for column in self.columns]
        headings = [f"{one} ".lstrip() for one in words]
        cells = zip(*(column.cells for column in self.columns), strict=True)
        for row, values in zip(self.rows, cells, strict=True):
            told = [f"{one}{value}" for one, value in zip(headings, values, strict=True) if value]
            lines = "\n  ".join(told) if any(headings) else ": ".join(told)
            yield Text(lines, style=row.style or "", overflow="fold")
