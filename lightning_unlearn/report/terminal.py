"""A report in the terminal: the same words and tables, without the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_unlearn.report.content import Column, Document, Table, format_cell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Grid

__all__ = ["print_document"]

_STYLES = {"method": "", "reference": "dim", "control": "italic"}


def print_document(document: Document, console: Console) -> None:
    """Print title, summary, sections and metadata; text is never read as markup."""
    from rich.text import Text

    console.print(Text(document.title, style="bold"))
    if document.summary:
        console.print(Text(document.summary))
    for section in document.sections:
        console.print()
        console.print(Text(section.title, style="bold cyan"))
        for paragraph in section.paragraphs:
            console.print(Text(paragraph))
        for table in section.tables:
            _print_table(table, console)
        for remark in section.remarks:
            console.print(Text(f"• {remark}", style="dim"))
    if document.metadata:
        console.print()
        console.print(Text("  ".join(f"{name}: {value}" for name, value in document.metadata.items()), style="dim"))


def _print_table(table: Table, console: Console) -> None:
    """Print the table; what is wider than the terminal goes on in a second block with the same rows."""
    from rich.text import Text

    blocks = _blocks(table, console.width)
    for number, columns in enumerate(blocks):
        title = table.title if number == 0 else f"{table.title} (continued)"
        console.print(_grid(table, columns, title))
    if table.note:
        console.print(Text(table.note, style="dim"))


def _blocks(table: Table, width: int) -> list[list[Column]]:
    """Split the columns so that each block fits: rich pads a cell by two, divides columns by one and adds two edges."""
    labels = max((len(row.label) for row in table.rows), default=0) + 4
    blocks: list[list[Column]] = [[]]
    used = labels
    for column in table.columns:
        cells = [len(format_cell(row.cells.get(column.name), column)) for row in table.rows]
        # Words wrap, so half their length is enough room.
        room = max(cells, default=0) // (2 if column.text else 1)
        needed = max(room, len(column.title)) + 3
        if blocks[-1] and used + needed > width:
            blocks.append([])
            used = labels
        blocks[-1].append(column)
        used += needed
    return blocks


def _grid(table: Table, columns: Sequence[Column], title: str) -> Grid:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("", no_wrap=True)
    for column in columns:
        grid.add_column(Text(column.title), justify="left" if column.text else "right", no_wrap=not column.text)
    for row in table.rows:
        cells = [Text(format_cell(row.cells.get(column.name), column)) for column in columns]
        grid.add_row(Text(row.label), *cells, style=_STYLES[row.kind])
    return grid
