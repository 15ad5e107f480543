"""Puts the tables of `compare_methods.py` into a page, a summary of each data set first; below its marker all is new.

uv run python examples/compare_page.py docs/comparison.md digits_random.json digits_class.json ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compare_methods import lines

MARKER = "<!-- Below this line: written by examples/compare_page.py -->"
REFERENCES = ("original", "retrained", "another seed")


def table(header: list[str], cells: list[list[str]]) -> list[str]:
    """Markdown rows."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in cells),
    ]


def mean(row: dict[str, Any], column: str) -> float | None:
    """The mean over seeds, `None` where there is none."""
    return row[column][0] if column in row else None


def brief(rows: dict[str, dict[str, Any]], name: str) -> str:
    """Forget divergence as a share of the original's, and points of test accuracy below retraining."""
    row = rows.get(name, {})
    divergence, accuracy = mean(row, "forget_kl"), mean(row, "test_accuracy")
    if divergence is None or accuracy is None:
        return "n/a" if row else ""
    untouched, retrained = mean(rows["original"], "forget_kl"), mean(rows["retrained"], "test_accuracy")
    if not untouched or retrained is None:
        return ""
    return f"{divergence / untouched:.2f} ({100 * (accuracy - retrained):+.1f})"


def summary(tables: dict[str, dict[str, Any]]) -> list[str]:
    """One line for every method, one column for every scenario."""
    names = [name for name in dict.fromkeys(name for rows in tables.values() for name in rows) if name != "retrained"]
    order = [name for name in REFERENCES if name in names] + sorted(set(names) - set(REFERENCES))
    cells = [[name, *(brief(rows, name) for rows in tables.values())] for name in order]
    return table(["model", *(title.split(",")[0] + title.partition(" seeds")[2] for title in tables)], cells)


def main() -> None:
    """Read the tables and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("tables", type=Path, nargs="+")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for path in arguments.tables:
        content = json.loads(path.read_text())
        found[content["title"]] = content["rows"]
    text = [arguments.page.read_text().split(MARKER)[0].rstrip(), "", MARKER]
    for dataset in dict.fromkeys(title.split(",")[0] for title in found):
        own = {title.split(", ", 1)[1]: rows for title, rows in found.items() if title.split(",")[0] == dataset}
        text += ["", f"## {dataset}", "", *summary(own)]
        for title, rows in own.items():
            header, cells = lines(rows)
            text += ["", f"### {dataset}, {title}", "", *table(header, cells)]
    arguments.page.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
