"""Puts the figures of benchmark runs into a page: everything below its marker is written anew.

    uv run python examples/benchmarks/tables.py docs/benchmarks.md overhead.json throughput.json long.json unlearn.json

Each JSON is what a benchmark wrote with `--json`; the heading of its table is the file's name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MARKER = "<!-- Below this line: written by examples/benchmarks/tables.py -->"


def cell(value: Any) -> str:
    """A value as Markdown; numbers with four significant digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def machine_line(machine: dict[str, Any]) -> str:
    """One sentence about the machine."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version is not None)
    device = f", {machine['accelerator']}" if machine["accelerator"] else ""
    return (
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} threads{device}; "
        f"{machine['system']}, Python {machine['python']}, {packages}."
    )


def section(path: Path) -> str:
    """Heading, machine and table of one run."""
    run = json.loads(path.read_text())
    rows: list[dict[str, Any]] = run["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        f"## {path.stem.replace('_', ' ').capitalize()}",
        "",
        machine_line(run["machine"]),
        "",
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    before, found, _ = arguments.page.read_text().partition(MARKER)
    if not found:
        parser.error(f"Expected `{arguments.page}` to have the line {MARKER!r}, but it has none. Add it.")
    arguments.page.write_text("\n\n".join([before + MARKER, *map(section, arguments.runs)]) + "\n")


if __name__ == "__main__":
    main()
