"""The tables of the forgetting study, from its rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_unlearn.deltas.judgement import PlanThresholds, judge_damage, judge_placement, judge_specificity

PLACEBOS = ("amnesiac", "amnesiac + repair", "partial amnesiac", "partial amnesiac + repair")


def mean_spread(values: Iterable[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    numbers = [value * scale for value in values]
    spread = f" ±{statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def table(rows: list[dict[str, Any]], optimizer: str) -> list[str]:
    """One Markdown table: sets down, methods inside, seeds as mean ± standard deviation."""
    columns = ["set", "model", "touched %", "rel. norm", "share", "damage / specificity", "forget %", "true-label %"]
    columns += ["retain %", "test %", "KL forget", "KL test", "AUROC"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    chosen = [row for row in rows if row["optimizer"] == optimizer]
    for name in dict.fromkeys(row["set"] for row in chosen):
        of_set = [row for row in chosen if row["set"] == name]
        twins = [{key[5:]: value for key, value in row.items() if key.startswith("twin_")} for row in of_set]
        labels = list(dict.fromkeys(row["model"] for row in of_set))
        for label in ("retrained twin", *labels):
            if label == "retrained twin":
                group = [twin for row, twin in zip(of_set, twins, strict=True) if row["model"] == "original"]
            else:
                group = [row for row in of_set if row["model"] == label]

            def cell(key: str, scale: float = 1.0, digits: int = 1, group: list[dict[str, Any]] = group) -> str:
                present = [row[key] for row in group if key in row]
                return mean_spread(present, scale, digits) if present else "-"

            judged = sorted({judgement(row) for row in group if "relative_norm" in row})
            lines.append(
                f"| {name} | {label} | {cell('touched_fraction', 100)} | {cell('relative_norm', 1, 3)} "
                f"| {cell('mean_share', 1, 2)} | {'; '.join(judged) or '-'} | {cell('forget_accuracy', 100)} "
                f"| {cell('true_label_accuracy', 100)} | {cell('retain_accuracy', 100)} | {cell('test_accuracy', 100)} "
                f"| {cell('forget_kl', 1, 3)} | {cell('test_kl', 1, 3)} | {cell('membership_auroc', 1, 2)} |"
            )
    return lines


def judgement(row: dict[str, Any]) -> str:
    """What the package's present thresholds say of a plan with these numbers."""
    limits = PlanThresholds()
    placement = judge_placement(row["mean_share"], limits)
    damage = judge_damage(row["relative_norm"], False, limits)
    return f"{damage} / {judge_specificity(placement, row['touched_fraction'], limits)}"


NORM_BINS = (0.0, *PlanThresholds().damage, math.inf)
TOUCHED_BINS = (0.0, 0.01, 0.05, 0.2, 1.01)


def threshold_table(
    rows: list[dict[str, Any]], optimizers: Sequence[str], key: str, edges: Sequence[float], *, repaired: bool = False
) -> list[str]:
    """What an edit costs in test accuracy, without repair or after it, by what the plan predicted from."""
    lines = [f"| {key} | edits | mean change of test accuracy (points) | worst |", "|---|---|---|---|"]
    plain = [
        row for row in rows if row["optimizer"] in optimizers and key in row and ("repair" in row["model"]) is repaired
        and "share" not in row["model"]
    ]  # fmt: skip
    for low, high in itertools.pairwise(edges):
        chosen = [row for row in plain if low < row[key] <= high]
        inside = [100 * (row["test_accuracy"] - row["original_test_accuracy"]) for row in chosen]
        if inside:
            lines.append(f"| {low:g} to {high:g} | {len(inside)} | {statistics.mean(inside):.1f} | {min(inside):.1f} |")
    return lines


def specificity_table(rows: list[dict[str, Any]], optimizer: str) -> list[str]:
    """Own steps against an innocent set's: how much of the way to the twin each goes, in KL on the forget set."""
    lines = [
        "| set | method | KL forget: original | own steps | placebo | own / original | placebo / original | nearer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = [row for row in rows if row["optimizer"] == optimizer]
    for name in dict.fromkeys(row["set"] for row in chosen):
        for label in PLACEBOS:
            own = [row for row in chosen if row["set"] == name and row["model"] == label]
            placebo = [row for row in chosen if row["set"] == name and row["model"] == f"placebo: {label}"]

            def ratio(group: list[dict[str, Any]]) -> str:
                logs = [math.log(max(row["forget_kl"], 1e-6) / max(row["original_forget_kl"], 1e-6)) for row in group]
                return f"{math.exp(statistics.mean(logs)):.2f}"

            nearer = sum(a["forget_kl"] < b["forget_kl"] for a, b in zip(own, placebo, strict=True))
            start = mean_spread((row["original_forget_kl"] for row in own), 1, 3)
            lines.append(
                f"| {name} | {label} | {start} | {mean_spread((r['forget_kl'] for r in own), 1, 3)} "
                f"| {mean_spread((r['forget_kl'] for r in placebo), 1, 3)} | {ratio(own)} | {ratio(placebo)} "
                f"| {nearer} of {len(own)} |"
            )
    return lines


def write_tables(rows: list[dict[str, Any]], path: Path, settings: Mapping[str, int]) -> None:
    """The tables alone, as Markdown; what they mean is written by people, in the page beside it."""
    seeds = len({row["seed"] for row in rows})
    setting = (
        f"Written by `examples/forgetting_study.py`; Fashion-MNIST, {settings['train']:,} training and "
        f"{settings['test']:,} test images, {settings['epochs']} epochs, batch {settings['batch']}, mean ± standard "
        f"deviation over {seeds} seeds. [forgetting-study.md](forgetting-study.md) says what follows."
    )
    lines = ["# Forgetting study: tables", "", setting]
    optimizers = tuple(dict.fromkeys(row["optimizer"] for row in rows))
    lines += ["", "## All optimizers", "", *_damage(rows, optimizers)]
    for optimizer in optimizers:
        lines += ["", f"## {optimizer}", "", "### Every model", "", *table(rows, optimizer)]
        lines += ["", *_damage(rows, (optimizer,))]
        lines += ["", "### Own steps against the placebo's", "", *specificity_table(rows, optimizer)]
    path.write_text("\n".join(lines) + "\n")


def _damage(rows: list[dict[str, Any]], optimizers: Sequence[str]) -> list[str]:
    lines = ["### Damage by relative norm, before repair", ""]
    lines += threshold_table(rows, optimizers, "relative_norm", NORM_BINS)
    lines += ["", "### After repair", ""]
    lines += threshold_table(rows, optimizers, "relative_norm", NORM_BINS, repaired=True)
    lines += ["", "### Damage by touched fraction, before repair", ""]
    return lines + threshold_table(rows, optimizers, "touched_fraction", TOUCHED_BINS)
