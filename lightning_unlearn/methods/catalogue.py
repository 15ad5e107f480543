"""The table of methods and their cards, made from what they declare: for the command line and the documentation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from lightning_unlearn.methods.base import Procedure, WeightEdit
from lightning_unlearn.methods.registry import METHODS

__all__ = ["CatalogueRow", "catalogue", "catalogue_page"]


@dataclass(frozen=True, slots=True)
class CatalogueRow:
    """What one method declares.

    Attributes:
        name: Name in the registry.
        kind: `"edit"` (computes a change of the weights), `"training"` (a pass in a Trainer) or `"procedure"`
            (trainings of its own).
        guarantee: See `UnlearningMethod`.
        cost: See `UnlearningMethod`.
        needs: What has to be given, in words.
        source: Authors, year, arXiv id.
        summary: First line of the card.
        card: The whole docstring.
        tuning: What tuning varies and from where to where, in words; empty where there is nothing to tune.
    """

    name: str
    kind: str
    guarantee: str
    cost: str
    needs: str
    source: str
    summary: str
    card: str
    tuning: str


def catalogue() -> list[CatalogueRow]:
    """All registered methods, by name.

    >>> [row.guarantee for row in catalogue() if row.name == "Retrain"]
    ['exact']
    """
    rows = []
    for name, cls in sorted(METHODS.items()):
        kind = "edit" if issubclass(cls, WeightEdit) else "procedure" if issubclass(cls, Procedure) else "training"
        needs = ", ".join(sorted(item.name.lower().replace("_", " ") for item in cls.requires)) or "nothing"
        card = inspect.cleandoc(cls.__doc__ or "")
        tuning = ", ".join(f"{argument} ({dimension})" for argument, dimension in cls.search_space.items())
        summary = card.split("\n")[0]
        rows.append(CatalogueRow(name, kind, cls.guarantee, cls.cost, needs, cls.source, summary, card, tuning))
    return rows


def catalogue_page() -> str:
    """The documentation page in Markdown: a table, then every card as in the code, and what tuning varies."""
    rows = catalogue()
    parts = [
        "# Methods",
        "",
        "Written by `lightning-unlearn methods --markdown` from what methods declare; edit their docstrings instead.",
        "",
        "| method | kind | guarantee | cost | needs | source |",
        "|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    for row in rows:
        tuning = f"Tuning varies: {row.tuning}." if row.tuning else "Nothing to tune."
        parts += ["", f"## {row.name}", "", "```text", row.card, "```", "", tuning]
    return "\n".join([*parts, ""])


def _line(row: CatalogueRow) -> str:
    link = f"[{row.name}](#{row.name.lower()})"
    return f"| {' | '.join((link, row.kind, row.guarantee, row.cost, row.needs, row.source))} |"
