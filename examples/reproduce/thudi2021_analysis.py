"""What the rows say: rank correlations with their uncertainty, and what the penalty changes seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

__all__ = [
    "PREDICTORS",
    "WHEN",
    "correlation",
    "file_label",
    "grid_rows",
    "last_rows",
    "paired_ratios",
    "seeds_of",
    "usable",
]

Row = dict[str, Any]
WHEN = {"tune": "in the fine-tuning", "start": "from the pretraining on"}
"""When the penalty is on."""
PREDICTORS: dict[str, Callable[[Row], float]] = {
    "unlearning error e": lambda row: row["error"],
    "e without the curvature": lambda row: row["error"] / row["singular_value"],
    "distance of the weights": lambda row: row["distance"],
    "learning rate x steps": lambda row: row["lr"] * row["steps"],
    "curvature": lambda row: row["singular_value"],
}
"""What could order settings; all but the first are there to see what the curvature in e adds."""


def file_label(task: str) -> str:
    """A task's name as part of a file's name."""
    return task.lower().replace(", ", "-")


def grid_rows(rows: Iterable[Row], task: str) -> list[Row]:
    """The learning rates x epochs of a task, without penalty, where the training stayed finite."""
    return [row for row in rows if row["task"] == task and row["gamma"] == 0 and usable(row)]


def last_rows(rows: Sequence[Row], task: str, lr: float, *, from_start: bool) -> list[Row]:
    """Every penalty at one learning rate, after the last epoch; in the fine-tuning only, or from the start."""
    of_task = [row for row in rows if row["task"] == task and row["lr"] == lr and usable(row)]
    of_task = [row for row in of_task if row["start"] == (row["gamma"] if from_start else 0)]
    last = max((row["epochs"] for row in of_task), default=0)
    return [row for row in of_task if row["epochs"] == last]


def usable(row: Row) -> bool:
    """Whether everything that is ranked is finite and positive."""
    return all(row[name] is not None and row[name] > 0 for name in ("error", "v_original", "v_single"))


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """The seeds, in order."""
    return sorted({row["seed"] for row in rows})


def correlation(rows: Sequence[Row], predictor: Callable[[Row], float], target: str, repeats: int = 1000) -> Row:
    """Rank correlation per seed, and log-log Pearson, with a bootstrap over trainings.

    All epochs of one training hang together, so the bootstrap draws trainings (seed x learning rate x gamma), with
    replacement, and not rows.

    Returns:
        Mean, lowest and highest Spearman correlation over the seeds, the pooled one with its 95 % interval, the mean
        log-log Pearson correlation, and the number of rows. Without repeats the interval is empty.
    """

    def of(chosen: Sequence[Row], measure: Callable[..., Any]) -> float:
        x, y = [predictor(row) for row in chosen], [row[target] for row in chosen]
        if min(len(set(x)), len(set(y))) < 2:
            return math.nan
        return float(measure(np.log(x), np.log(y)).statistic)

    by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds_of(rows)]
    ranks = [of(one, spearmanr) for one in by_seed]
    trainings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        trainings.setdefault((row["seed"], row["lr"], row.get("gamma", 0), row.get("start", 0)), []).append(row)
    groups, generator = list(trainings.values()), np.random.default_rng(0)
    draws = (generator.integers(len(groups), size=len(groups)) for _ in range(repeats))
    drawn = [of([row for place in one for row in groups[place]], spearmanr) for one in draws]
    low, high = np.nanpercentile(drawn, [2.5, 97.5]).tolist() if drawn else (None, None)
    return {
        "rows": len(rows), "spearman": statistics.fmean(ranks), "lowest": min(ranks), "highest": max(ranks),
        "pooled": of(rows, spearmanr), "interval": [low, high],
        "pearson": statistics.fmean(of(one, pearsonr) for one in by_seed),
    }  # fmt: skip


def paired_ratios(rows: Sequence[Row], gamma: float, name: str) -> list[float]:
    """Per seed, the value with the penalty over the value without."""
    plain = {row["seed"]: row[name] for row in rows if row["gamma"] == 0}
    return [row[name] / plain[row["seed"]] for row in rows if row["gamma"] == gamma and row["seed"] in plain]
