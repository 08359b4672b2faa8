"""Tables on a narrow terminal: broken between words, the first column last; or a row as lines of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

ENDLESS = 1_000_000  # columns: more than any table has
UNBROKEN = 12  # letters: no word of so many is broken, and longer ones
NARROWEST = 8  # into pieces of so many at least


def fitted(drawn: "RenderableType", console: "Console") -> "RenderableType":
    """`drawn`, with the tables in it no wider than the terminal; rich would cut them, or break words in all columns."""
    from rich.console import Group
    from rich.table import Table

    if isinstance(drawn, Group):
        return Group(*(fitted(part, console) for part in drawn.renderables))
    return _fitted(drawn, console) if isinstance(drawn, Table) else drawn


def _fitted(table: "Table", console: "Console") -> "Table":
    from rich.measure import Measurement

    endless = console.options.update_width(ENDLESS)
    whole = Measurement.get(console, endless, table).maximum
    if whole <= console.width:
        return table
    full, words, least = list[int](), list[int](), list[int]()
    for column in table.columns:  # the first says what a row is about, and gives up nothing while others can
        header, *cells = (Measurement.get(console, endless, each) for each in (column.header, *column.cells))
        full.append(max(each.maximum for each in (header, *cells)))
        word = max(each.minimum for each in (header, *cells))
        words.append(word if words else full[0])
        least.append(word if word <= UNBROKEN else max(header.minimum, NARROWEST))
    room = console.width - (whole - sum(full))
    if sum(least) > room and table.show_header:
        return _fitted(_a_line_each(table), console)
    for column, width in zip(table.columns, _widths(full, words, least, room), strict=True):
        column.width, column.overflow = max(width, 1), "fold"
    return table


def _widths(full: Sequence[int], words: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths that sum to `room`: the widest are broken between words; then one after the other inside its words."""
    widths = [min(width, max(room, word)) for width, word in zip(full, words, strict=True)]
    while sum(widths) > room and (wide := [i for i, width in enumerate(widths) if width > words[i]]):
        widths[max(wide, key=lambda i: widths[i])] -= 1
    first, *others = range(len(widths))
    for i in (*sorted(others, key=lambda i: -widths[i]), first):
        widths[i] -= max(0, min(sum(widths) - room, widths[i] - least[i]))
    return widths


def _a_line_each(table: "Table") -> "Table":
    """The rows of a table that would be broken everywhere, below each other: a line for each cell that is not empty."""
    from rich.table import Table

    lines = Table(show_header=False, box=None, pad_edge=False)
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        if lines.row_count:
            lines.add_row()
        for column, cell in zip(table.columns, cells, strict=True):
            if cell:
                lines.add_row(column.header, cell, style=row.style)
    return lines
