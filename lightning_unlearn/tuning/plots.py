"""A picture of a study: goal against utility, and what can be had of both."""

from __future__ import annotations

from matplotlib.figure import Figure

from lightning_unlearn.tuning.objective import Goal
from lightning_unlearn.tuning.result import TuningResult

__all__ = ["plot_pareto"]

_GOAL: dict[Goal, str] = {
    "privacy": "|error on forgotten samples - validation error|",
    "bias_removal": "share of the wrong labels that are still answered",
}
_MARKERS = "os^Dv<>Pp*Xh8"


def plot_pareto(result: TuningResult, *, title: str | None = None) -> Figure:
    """Every trial by its goal error and its validation error, with the front that no trial beats in both.

    The best trial and each method's defaults are marked; the dotted line is the original model's validation error.

    Args:
        result: Of `tune`.
        title: Above the picture; by default goal and lambda.

    Returns:
        A figure; `figure.savefig("tuning.png")` writes it.

    Raises:
        LightningUnlearnError: no trial came to its end.
    """
    best, objective = result.best, result.objective
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    ended = [(trial, trial.rates) for trial in result.trials if trial.rates is not None]
    labels = sorted({trial.label for trial, _ in ended})
    for place, label in enumerate(labels):
        rows = [(trial, rates) for trial, rates in ended if trial.label == label]
        points = [(objective.goal_error(rates), rates.validation) for _, rates in rows]
        marker, colour = _MARKERS[place % len(_MARKERS)], f"C{place % 10}"
        axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, alpha=0.6, label=label)
        defaults = [point for point, (trial, _) in zip(points, rows, strict=True) if trial.is_default]
        for point in defaults:
            axes.annotate("defaults", point, textcoords="offset points", xytext=(6, 6), fontsize=8, color=colour)
            axes.scatter(*point, s=90, facecolors="none", edgecolors=colour)
    front = [(trial.goal_error or 0.0, trial.validation_error or 0.0) for trial in result.pareto_front()]
    axes.plot(*zip(*front, strict=True), color="black", linewidth=1, drawstyle="steps-post", label="front")
    chosen = (best.goal_error or 0.0, best.validation_error or 0.0)
    axes.scatter(*chosen, marker="*", s=220, color="black", zorder=3, label="chosen")
    original = ended[0][1].original_validation
    axes.axhline(original, color="grey", linestyle=":", label="original model")
    axes.set_xlabel(f"goal error: {_GOAL[objective.goal]}")
    axes.set_ylabel("validation error")
    axes.set_title(title or f"{objective.goal.replace('_', ' ')}, lambda = {objective.lambda_:g}")
    axes.legend(fontsize=8)
    return figure
