"""The tables of `metric_sanity.py` below the marker of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sanity_models import METHODS, ROWS, SCENARIOS, SHARE
from sanity_rule import CAP, CLOSE, FAR

__all__ = ["MARKER", "write_page"]

MARKER = "<!-- Below this line: written by examples/metric_sanity.py -->"


def _table(header: list[str], cells: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _number(value: float) -> str:
    return f"≥ {CAP:.0f}" if value >= CAP else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _setting(setting: dict[str, Any]) -> list[str]:
    seeds = setting["replicates"] * setting["group"]
    sizes = "; ".join(f"{name}: {ROWS[name][0]:,} images, {n} epochs" for name, n in setting["epochs"].items())
    text = (
        f"{sizes}. Metrics of single models: {seeds} seeds; metrics of groups: {setting['replicates']} pairs of groups "
        f"of {setting['group']} models. Forgotten: {100 * SHARE:.0f} % of the rows, or a class. In brackets, and in "
        "the tables further down: mean distances from the reference in units of the spread between retrained models; "
        f"`separable` from {FAR:g} on, `not separable` up to {CLOSE:g}, `unclear` between; `unstable` where the second "
        f"retrained model is farther than {CLOSE:g}. {setting['training_seconds'] / 60:.0f} minutes of training in all."
    )
    return [text]


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every metric, a column for every data set and scenario: the separation, and whether it is right."""
    places = list(dict.fromkeys((row["dataset"], row["scenario"]) for row in rows))
    cells = []
    for name in dict.fromkeys(row["metric"] for row in rows):
        line = [f"`{name}`"]
        for dataset, scenario in places:
            (row,) = [
                one for one in rows if (one["dataset"], one["scenario"], one["metric"]) == (dataset, scenario, name)
            ]
            if "why" in row:
                line.append("n/a")
            else:
                line.append(f"{'pass' if row['sane'] else '**' + row['finding'] + '**'} ({_number(row['original'])})")
        cells.append(line)
    return _table(["metric", *(f"{dataset}, {scenario}" for dataset, scenario in places)], cells)


def _details(rows: list[dict[str, Any]]) -> list[str]:
    header = ["metric", "original", "second retrained", *METHODS, "finding", "spread", "reference's value"]
    cells = []
    for row in rows:
        if "why" in row:
            cells.append([f"`{row['metric']}`", *[""] * (len(header) - 4), row["why"], "", ""])
            continue
        far = [_number(row[name]) for name in ("original", "second", *METHODS)]
        cells.append([f"`{row['metric']}`", *far, row["finding"], f"{row['spread']:.3g}", f"{row['reference']:.3g}"])
    return _table(header, cells)


def write_page(page: Path, content: dict[str, Any]) -> None:
    """Write everything below the marker anew; a page that is not there consists of the tables alone."""
    rows: list[dict[str, Any]] = content["rows"]
    before = page.read_text().split(MARKER)[0].rstrip() if page.exists() else "# Sanity of the metrics"
    text = [before, "", MARKER, "", "## Sanity tables", "", *_setting(content["setting"]), "", *_summary(rows)]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for scenario in SCENARIOS:
            own = [row for row in rows if (row["dataset"], row["scenario"]) == (dataset, scenario)]
            text += ["", f"### {dataset}, {scenario}", "", *_details(own)]
    page.write_text("\n".join(text) + "\n")
