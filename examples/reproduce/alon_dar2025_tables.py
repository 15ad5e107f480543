"""Tables of the study as Markdown, written below the marker of the page that people write."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alon_dar2025_settings import GOALS, METHODS, Goal
from studies import Row, spread, table

__all__ = ["REACHED", "file_label", "of", "sections", "summary_of"]

REACHED = 0.05
"""A goal counts as reached where its error is at most this above the retrained model's (ours)."""


def file_label(name: str) -> str:
    """The name of a task as part of a file's name."""
    return "-".join(name.lower().replace(",", "").split())


def of(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def reference(rows: Sequence[Row], row: Row, model: str) -> Row:
    """The original or retrained model of the same width, seed and goal."""
    return of(rows, kind="model", model=model, **{name: row[name] for name in ("task", "width", "seed", "goal")})[0]


def rises(rows: Sequence[Row], chosen: Sequence[Row]) -> list[float]:
    """Test error above that of the original: a value for each seed, the mean over lambdas."""
    found: dict[int, list[float]] = {}
    for row in chosen:
        rise = row["test_error"] - reference(rows, row, "original")["test_error"]
        found.setdefault(row["seed"], []).append(rise)
    return [statistics.fmean(one) for one in found.values()]


def reached(rows: Sequence[Row], chosen: Sequence[Row]) -> int:
    """How often the goal was reached."""
    return sum(row["goal_error"] <= reference(rows, row, "retrained")["goal_error"] + REACHED for row in chosen)


def _percent(chosen: Sequence[Row], name: str) -> str:
    return spread((row.get(name) for row in chosen), scale=100)


def network_table(rows: Sequence[Row], widths: Sequence[int]) -> list[str]:
    """How large the networks are, and what they had memorised."""
    cells = []
    for width in widths:
        right = of(rows, width=width, kind="model", goal="privacy", model="original")
        wrong = of(rows, width=width, kind="model", goal="bias_removal", model="original")
        retrained = of(rows, width=width, kind="model", goal="privacy", model="retrained")
        size = of(rows, width=width, kind="network")[0]["parameters"]
        cells.append(
            [
                str(width), f"{size:,}", _percent(right, "retain_error"), _percent(right, "forget_error"),
                _percent(right, "test_error"), _percent(wrong, "retain_error"), _percent(wrong, "forget_error"),
                _percent(wrong, "test_error"), _percent(retrained, "forget_error"), _percent(retrained, "test_error"),
            ]
        )  # fmt: skip
    names = ("kept", "forget", "test")
    columns = [*(f"{name} %, right labels" for name in names), *(f"{name} %, wrong labels" for name in names)]
    return table(["width", "parameters", *columns, "forget %, retrained", "test %, retrained"], cells)


def goal_table(
    rows: Sequence[Row], goal: Goal, widths: Sequence[int], lambdas: Sequence[float], shown: float
) -> list[str]:
    """What each method reached, for each lambda, and where decision regions changed."""
    cells = []
    for width in widths:
        here = of(rows, width=width, kind="model", goal=goal)
        for model in ("original", "retrained"):
            chosen = of(here, model=model)
            same = [[_percent(chosen, name)] + ["" for _ in lambdas[1:]] for name in ("test_error", "goal_error")]
            regions = [_percent(chosen, name) for name in ("near_change", "far_change")]
            cells.append([str(width), model, *same[0], *same[1], _percent(chosen, "true_error"), *regions])
        for model in METHODS:
            chosen = [of(here, model=model, **{"lambda": weight}) for weight in lambdas]
            line = [_percent(one, name) for name in ("test_error", "goal_error") for one in chosen]
            main = of(here, model=model, **{"lambda": shown})
            regions = [_percent(main, name) for name in ("true_error", "near_change", "far_change")]
            cells.append([str(width), model, *line, *regions])
    columns = [f"{name}, {weight:g}" for name in ("test %", "goal error %") for weight in lambdas]
    last = ["error against true labels %", "near %", "far %"]
    return table(["width", "model", *columns, *last], cells)


def claim_table(rows: Sequence[Row], goal: Goal, widths: Sequence[int]) -> list[str]:
    """How often the goal was reached, and what it cost, over all seeds and lambdas."""
    cells = []
    for width in widths:
        here = of(rows, width=width, kind="model", goal=goal)
        before = of(here, model="original")
        line = [str(width), f"{reached(rows, before)} of {len(before)}"]
        for model in METHODS:
            chosen = of(here, model=model)
            line += [f"{reached(rows, chosen)} of {len(chosen)}", spread(rises(rows, chosen), digits=2, scale=100)]
        cells.append(line)
    columns = [f"{model}: {what}" for model in METHODS for what in ("reached", "test error +")]
    return table(["width", "untouched: reached", *columns], cells)


def tuning_table(rows: Sequence[Row]) -> list[str]:
    """What tuning took, and how often the defaults won."""
    cells = []
    for goal, name in GOALS.items():
        for model in METHODS:
            trials = of(rows, kind="tuning", goal=goal, model=model)
            chosen = of(rows, kind="model", goal=goal, model=model)
            seconds = [one for row in trials for one in row["trial_seconds"]]
            won = f"{sum(row['is_default'] for row in chosen)} of {len(chosen)}"
            gap = [row["test_error"] - row["validation_error"] for row in chosen if row["validation_error"] is not None]
            mean = f"{statistics.fmean(seconds):.2f}" if seconds else "-"
            lost = str(sum(row["lost"] for row in trials))
            cells.append([name, model, str(len(seconds)), mean, lost, won, spread(gap, digits=2, scale=100)])
    columns = ["goal", "method", "trials", "s a trial", "without a result", "defaults chosen"]
    return table([*columns, "test error above validation error, points"], cells)


def summary_of(rows: Sequence[Row], tasks: Sequence[Row]) -> dict[str, Any]:
    """What the claims need, for machines: goals reached, rise of the test error, region change near and far."""
    found: dict[str, Any] = {}
    for task in tasks:
        for goal in GOALS:
            for width in task["widths"]:
                here = of(rows, task=task["name"], width=width, goal=goal, kind="model")
                for model in METHODS:
                    chosen = of(here, model=model)
                    found[f"{task['name']}, {goal}, {width}, {model}"] = {
                        "reached": reached(rows, chosen),
                        "runs": len(chosen),
                        "test_error_rise": statistics.fmean(rises(rows, chosen)),
                        "near_change": statistics.fmean(row["near_change"] for row in chosen),
                        "far_change": statistics.fmean(row["far_change"] for row in chosen),
                    }
    return found


def sections(rows: Sequence[Row], tasks: Sequence[Row], settings: Row, figures: Sequence[Path]) -> Iterator[str]:
    """The part of the page that the script writes.

    Args:
        rows: Of all jobs, each with its task, width and seed.
        tasks: Settings of the tasks, with their names.
        settings: Of the preset.
        figures: Pictures that were drawn.
    """
    for task in tasks:
        name, widths = task["name"], task["widths"]
        mine = of(rows, task=name)
        label = f"-{file_label(name)}-"
        pictures = {one.stem.partition(label)[2]: one for one in figures if label in one.stem}
        yield f"## {name}"
        yield (
            f"{task['train']:,} training images of which {task['forgotten']} are forgotten, {task['seeds']} seeds. "
            "Errors are in percent; *forget* is against the labels that were trained with. Retrained is trained "
            "without the forgotten images."
        )
        yield "\n".join(network_table(mine, widths))
        for kind in ("test-error", "goal-error", "regions"):
            yield _picture(pictures[kind])
        for goal, title in GOALS.items():
            yield f"### {name}: {title}"
            yield (
                f"*Reached*: over seeds and lambdas, a goal error at most {100 * REACHED:g} points above that of the "
                "retrained model. *Test error +*: points above the original. In the second table, numbers behind a "
                f"name are lambdas; the last three columns are at lambda {settings['shown_lambda']:g}."
            )
            yield "\n".join(claim_table(mine, goal, widths))
            yield "\n".join(goal_table(mine, goal, widths, settings["lambdas"], settings["shown_lambda"]))
            for kind in sorted(kind for kind in pictures if kind.startswith(f"plane-{file_label(title)}")):
                yield _picture(pictures[kind])
        yield f"### {name}: tuning"
        yield "\n".join(tuning_table(mine))


def _picture(path: Path) -> str:
    return f"![{path.stem}]({path.name})"
