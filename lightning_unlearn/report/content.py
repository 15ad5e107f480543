"""What a report is made of: sections of paragraphs, tables of numbers with their spread, figures and remarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["Cell", "Column", "Document", "Figure", "Row", "RowKind", "Section", "Table", "format_cell"]

RowKind: TypeAlias = Literal["method", "reference", "control"]
"""A method under test, what it is compared with (original, retrained), or a control (placebo)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A number that was measured once or several times.

    Attributes:
        mean: Mean over the repetitions.
        spread: Standard deviation over them (unbiased), `None` for a single one.
        count: How many there were.
    """

    mean: float
    spread: float | None = None
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Summarise repetitions.

        Raises:
            ValueError: there are none.

        >>> Cell.of([1.0, 2.0, 3.0])
        Cell(mean=2.0, spread=1.0, count=3)
        """
        if not values:
            raise ValueError("Expected `values` to hold at least one number, but got none.")
        if not all(math.isfinite(value) for value in values):
            return cls(math.nan, None, len(values))
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))


@dataclass(frozen=True, slots=True)
class Column:
    """How the cells of a column are shown; numbers are stored unscaled.

    Attributes:
        name: Key of the cells, and the header unless `header` is given.
        header: What the reader sees.
        factor: Multiplies mean and spread for display, such as 100 for percent.
        decimals: Digits after the point.
        help: One sentence that explains the column.
        text: Whether the cells are words, which are aligned left and may be broken into lines.
    """

    name: str
    header: str = ""
    factor: float = 1.0
    decimals: int = 2
    help: str = ""
    text: bool = False

    @property
    def title(self) -> str:
        """The header to show."""
        return self.header or self.name


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a label and the cells that are known, by column name. A text stands for itself."""

    label: str
    cells: Mapping[str, Cell | str]
    kind: RowKind = "method"


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a title above and a note below it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture.

    Attributes:
        title: Heading.
        svg: An `<svg>` element that takes its text colour from the page.
        caption: What to see in it.
        description: The same for readers who cannot see it.
    """

    title: str
    svg: str
    caption: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with, in this order, paragraphs, figures, tables and remarks."""

    title: str
    paragraphs: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """Title, summary and sections.

    Attributes:
        title: Of the whole report.
        summary: One paragraph that may be read alone.
        sections: In reading order.
        metadata: Name -> value, shown small at the end.
    """

    title: str
    summary: str = ""
    sections: tuple[Section, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def format_cell(cell: Cell | str | None, column: Column) -> str:
    """Text of a cell: mean, with its spread if there is one, or a dash where nothing is known.

    >>> format_cell(Cell.of([0.5, 0.7]), Column("accuracy", factor=100, decimals=0))
    '60 ± 14'
    """
    if cell is None:
        return "\N{EN DASH}"
    if isinstance(cell, str):
        return cell
    if not math.isfinite(cell.mean):
        return "not finite"

    def text(value: float) -> str:
        shown = f"{value * column.factor:.{column.decimals}f}"
        # A rounded negative zero would suggest a sign that is not there.
        return shown.lstrip("-") if float(shown) == 0 else shown

    return text(cell.mean) if cell.spread is None else f"{text(cell.mean)} ± {text(cell.spread)}"
