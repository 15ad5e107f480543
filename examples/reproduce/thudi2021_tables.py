"""Tables of the study as Markdown, written below the marker of the page that people write."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from studies import Row, spread, table
from thudi2021_analysis import (
    PREDICTORS,
    WHEN,
    correlation,
    file_label,
    grid_rows,
    last_rows,
    paired_ratios,
    usable,
)

from lightning_unlearn.functional.standard_deviation_penalty import convert_gamma

__all__ = ["sections", "summary_of"]

_TOY_ROWS = {(0.01, 1), (0.05, 1), (0.05, 5), (0.2, 5)}
"""Of the smallest case, these stand for the grid."""
_KINDS = ("pretrain", "tune", "cost")
_TARGETS = {"v_single": "single gradient", "v_original": "untouched"}


def correlation_table(rows: Sequence[Row], repeats: int) -> list[str]:
    """How well e, and simpler quantities, order the verification errors."""
    cells = []
    for target, label in _TARGETS.items():
        for name, predictor in PREDICTORS.items():
            found = correlation(rows, predictor, target, repeats)
            low, high = found["interval"]
            cells.append(
                [
                    label, name, f"{found['spearman']:.3f}", f"{found['lowest']:.3f} to {found['highest']:.3f}",
                    f"{found['pooled']:.3f}", f"{low:.3f} to {high:.3f}", f"{found['pearson']:.3f}", str(found["rows"]),
                ]
            )  # fmt: skip
    columns = ["v of", "ordered by", "Spearman, mean of seeds", "seeds", "pooled", "95 % interval"]
    return table([*columns, "log-log Pearson", "points"], cells)


def improvement_table(rows: Sequence[Row]) -> list[str]:
    """In which part of the grid a single gradient comes nearer to the twin than doing nothing; by thirds of e."""
    ordered = sorted(rows, key=lambda row: row["error"])
    cells = []
    for third in range(3):
        part = ordered[third * len(ordered) // 3 : (third + 1) * len(ordered) // 3]
        if not part:
            continue
        ratios = [row["v_single"] / row["v_original"] for row in part]
        bound = [row["v_single"] / row["error"] for row in part]
        cells.append(
            [
                f"{part[0]['error']:.2g} to {part[-1]['error']:.2g}", str(len(part)),
                f"{sum(ratio < 1 for ratio in ratios)} of {len(part)}", f"{statistics.median(ratios):.3g}",
                f"{min(ratios):.3g} to {max(ratios):.3g}", f"{min(bound):.2g} to {max(bound):.2g}",
            ]
        )  # fmt: skip
    return table(["e", "points", "nearer than untouched", "median v ratio", "v ratio", "v / e"], cells)


def grid_table(rows: Sequence[Row]) -> list[str]:
    """The grid itself."""
    cells = []
    for lr, epochs in sorted({(row["lr"], row["epochs"]) for row in rows}):
        chosen = [row for row in rows if (row["lr"], row["epochs"]) == (lr, epochs)]
        names = ("error", "singular_value", "distance", "v_original", "v_single")
        cells.append([f"{lr:g}", str(epochs), *(spread(row[name] for row in chosen) for name in names)])
        for name in ("original", "single", "retrained"):
            cells[-1].append(spread((row.get(f"test_accuracy_{name}") for row in chosen), scale=100))
    accuracies = [f"test %, {name}" for name in ("untouched", "single gradient", "retrained")]
    columns = ["lr", "epochs", "e", "sigma", "distance", "v, untouched", "v, single gradient", *accuracies]
    if all(cell == "-" for row in cells for cell in row[7:]):
        columns, cells = columns[:7], [row[:7] for row in cells]
    return table(columns, cells)


def penalty_table(rows: Sequence[Row], classes: int) -> list[str]:
    """What the penalty does at one learning rate after the last epoch; ratios are to gamma 0 of the same seed."""
    cells, gammas = [], sorted({row["gamma"] for row in rows})
    for gamma in gammas:
        chosen = [row for row in rows if row["gamma"] == gamma]
        code = convert_gamma(gamma, classes, source="paper", target="code")
        cells.append([f"{gamma:g}", f"{code:.3g}"])
        for name in ("error", "v_single", "v_original"):
            ratio = spread(paired_ratios(rows, gamma, name), 2) if gamma else "1"
            cells[-1] += [spread(row[name] for row in chosen), ratio]
        cells[-1] += [
            spread((row["test_accuracy_original"] for row in chosen), scale=100),
            spread((row["test_accuracy_retrained"] for row in chosen), scale=100),
            f"{_both_lower(rows, gamma)} of {len(chosen)}" if gamma else "",
        ]
    columns = ["gamma", "code's", "e", "ratio", "v, single gradient", "ratio", "v, untouched", "ratio"]
    return table([*columns, "test %, untouched", "test %, retrained", "e and v single lower"], cells)


def order_of_gammas(rows: Sequence[Row]) -> list[str]:
    """Whether e orders the strengths of the penalty, where learning rate and steps are the same for all of them."""
    cells = []
    for target, label in _TARGETS.items():
        for name in ("unlearning error e", "distance of the weights", "curvature"):
            found = correlation(rows, PREDICTORS[name], target, repeats=0)
            seeds = f"{found['lowest']:.3f} to {found['highest']:.3f}"
            cells.append([label, name, f"{found['spearman']:.3f}", seeds])
    return table(["v of", "gammas ordered by", "Spearman, mean of seeds", "seeds"], cells)


def _both_lower(rows: Sequence[Row], gamma: float) -> int:
    pairs = zip(paired_ratios(rows, gamma, "error"), paired_ratios(rows, gamma, "v_single"), strict=True)
    return sum(error < 1 and v < 1 for error, v in pairs)


def cost_table(rows: Sequence[Row]) -> list[str]:
    """Seconds, gradients and storage, and what they bought."""
    cells = []
    for way, request in dict.fromkeys((row["way"], row["request"]) for row in rows):
        chosen = [row for row in rows if (row["way"], row["request"]) == (way, request)]
        gradients = statistics.fmean(row["gradients"] for row in chosen)
        cells.append(
            [
                way, request, spread(row["training_seconds"] for row in chosen),
                spread(row["seconds"] for row in chosen), f"{gradients:,.0f}",
                spread((row["share"] for row in chosen), scale=100),
                f"{statistics.fmean(row['storage'] for row in chosen) / 2**20:.2f}",
                spread(row.get("v") for row in chosen), spread((row["test_accuracy"] for row in chosen), scale=100),
                spread((row["forget_accuracy"] for row in chosen), scale=100),
                spread(row["membership_auroc"] for row in chosen), spread(row.get("risk") for row in chosen),
            ]
        )  # fmt: skip
    columns = ["way", "request", "training s", "forgetting s", "gradients", "% of a training", "storage MiB", "v"]
    return table([*columns, "test %", "forget %", "AUROC", "privacy risk"], cells)


def summary_of(rows: Sequence[tuple[str, Row]], tasks: Sequence[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """The rank correlations that the tables print, for machines."""
    groups = {"toy": [row for kind, row in rows if kind == "toy"]}
    groups |= {task["name"]: grid_rows([row for kind, row in rows if kind == "tune"], task["name"]) for task in tasks}
    return {
        f"{name}, {target}, {label}": correlation(chosen, predictor, target, repeats)
        for name, chosen in groups.items()
        if chosen
        for target in _TARGETS
        for label, predictor in PREDICTORS.items()
    }


def sections(rows: Sequence[tuple[str, Row]], tasks: Sequence[Row], figures: Sequence[Path], repeats: int) -> list[str]:
    """The part of the page that the script writes."""
    toys = [row for kind, row in rows if kind == "toy"]
    found = ["## Softmax regression: figures", *_pictures(figures, "toy"), *_ordering(toys, repeats)] if toys else []
    for task in tasks:
        found += _task(rows, task, figures, repeats)
    return found


def _pictures(figures: Sequence[Path], ending: str) -> list[str]:
    return [f"![{figure.stem}]({figure.name})" for figure in figures if figure.stem.endswith(f"-{ending}")]


def _ordering(rows: Sequence[Row], repeats: int) -> list[str]:
    shown = [row for row in rows if row.get("task") or (row["lr"], row["epochs"]) in _TOY_ROWS]
    lines = (correlation_table(rows, repeats), improvement_table(rows), grid_table(shown))
    return ["\n".join(one) for one in lines]


def _task(rows: Sequence[tuple[str, Row]], task: Row, figures: Sequence[Path], repeats: int) -> Iterator[str]:
    name, label = task["name"], file_label(task["name"])
    of = {part: [row for kind, row in rows if kind == part and row["task"] == name] for part in _KINDS}
    yield f"## {name}: figures"
    starts = {gamma: [row for row in of["pretrain"] if row["start"] == gamma] for gamma in (0.0, *task["gammas"])}
    accuracies = [f"{spread((row['test_accuracy'] for row in one), scale=100)} % ({g:g})" for g, one in starts.items()]
    yield (
        f"{of['pretrain'][0]['parameters']:,} parameters. Test accuracy of the pretrained start, by the gamma it was "
        f"trained with: {', '.join(accuracies)}."
    )
    if lost := sum(not usable(row) for row in of["tune"]):
        yield f"{lost} rows are left out: the training diverged, or an error is zero."
    if grid := grid_rows(of["tune"], name):
        yield "### Grid of learning rates and epochs, without penalty"
        yield from _pictures(figures, f"{label}-grid")
        yield from _ordering(grid, repeats)
    if task["gammas"]:
        yield f"### SD penalty, learning rate {task['penalty_rate']:g}, {task['epochs']} epochs"
        yield from _pictures(figures, f"{label}-penalty")
        for kind, when in WHEN.items():
            penalties = last_rows(of["tune"], name, task["penalty_rate"], from_start=kind == "start")
            yield f"The penalty is on {when}:"
            yield "\n".join(penalty_table(penalties, task["classes"]))
            yield "\n".join(order_of_gammas(penalties))
    yield from _pictures(figures, f"{label}-price")
    if of["cost"]:
        yield f"### Costs, learning rate {task['cost_rate']:g}"
        yield "\n".join(cost_table(of["cost"]))
