"""Tables of the study as Markdown, written below the marker of the page that people write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ding2024_linear import MODELS
from ding2024_settings import Preset
from images import CLASS_NAMES
from studies import Row, spread, table

__all__ = ["COLUMNS", "per_seed", "sections"]

COLUMNS = {
    "ua": "UA",
    "ra": "RA",
    "ta": "TA",
    "class_accuracy": "test accuracy of the class",
    "mia": "MIA efficacy",
    "gap": "average gap",
}
"""All of them in percent."""

_MASKS = {"retain": "mask of retain (RBM)", "forget": "mask of forget"}


def per_seed(rows: Iterable[Row], name: str) -> list[float]:
    """The mean over classes in every seed, so that a spread is that over seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row[name] is not None:
            found.setdefault(row["seed"], []).append(row[name])
    return [sum(values) / len(values) for _, values in sorted(found.items())]


def cells(rows: Sequence[Row]) -> list[str]:
    """The numbers of a model."""
    values = [spread(per_seed(rows, name), scale=100) for name in COLUMNS]
    return [*values, spread(per_seed(rows, "seconds"), 2), spread(per_seed(rows, "steps"))]


def class_table(rows: Sequence[Row], columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Models by what `names` say, in the order in which they were run."""
    keys = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    body = []
    for key in keys:
        chosen = [row for row in rows if tuple(row[name] for name in names) == key]
        body.append([*(f"{one:g}" if isinstance(one, float) else str(one) for one in key), *cells(chosen)])
    return table([*columns, *COLUMNS.values(), "seconds", "steps"], body)


def worst_class_table(rows: Sequence[Row], preset: Preset, dataset: str) -> list[str]:
    """UA, RA and average gap of every class apart."""
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        line = [model]
        for forgotten in preset.classes:
            chosen = [row for row in rows if row["model"] == model and row["forgotten"] == forgotten]
            line += [spread((row[name] for row in chosen), scale=100) for name in ("ua", "ra", "gap")]
        body.append(line)
    names = [CLASS_NAMES[dataset][number] for number in preset.classes]  # type: ignore[index]
    return table(["model", *(f"{name}: {one}" for name in names for one in ("UA", "RA", "gap"))], body)


def fit_table(rows: Sequence[Row]) -> list[str]:
    """UA and MIA efficacy before and after fine-tuning, by how long the original was trained."""
    body = []
    for epochs in sorted({row["value"] for row in rows}):
        line = [str(epochs)]
        for model in ("original", "fine-tuning"):
            chosen = [row for row in rows if row["value"] == epochs and row["model"] == model]
            line += [spread(per_seed(chosen, name), scale=100) for name in ("ra", "ua", "mia")]
        body.append(line)
    heads = [f"{model}: {COLUMNS[name]}" for model in ("original", "fine-tuning") for name in ("ra", "ua", "mia")]
    return table(["epochs", *heads], body)


def losses(rows: Sequence[Row]) -> list[str]:
    """RL and UL over seeds; what is only round-off is 0."""
    return [spread(row[name] if row[name] > 1e-12 else 0.0 for row in rows) for name in ("retain", "forget")]


def linear_table(rows: Sequence[Row], over: str, label: str, models: Sequence[str]) -> list[str]:
    """Losses of every model over what is varied."""
    chosen = [row for row in rows if row["over"] == over]
    body = []
    for value in sorted({row[over] for row in chosen}):
        line = [f"{value:g}"]
        for model in models:
            line += losses([row for row in chosen if row[over] == value and row["model"] == model])
        body.append(line)
    return table([label, *(f"{_MASKS.get(model, model)}: {one}" for model in models for one in ("RL", "UL"))], body)


def ratio_table(rows: Sequence[Row]) -> list[str]:
    """How much of the golden model's UL the masked models have, in percent; pairs of the same draw."""
    chosen = [row for row in rows if row["over"] == "share"]
    forget = {(row["share"], row["seed"], row["model"]): row["forget"] for row in chosen}
    seeds = sorted({row["seed"] for row in chosen})
    body = []
    for share in sorted({row["share"] for row in chosen}):
        pairs = [[forget[share, seed, model] / forget[share, seed, "golden"] for seed in seeds] for model in MODELS[3:]]
        body.append([f"{share:g}", *(spread([round(one, 9) for one in ratios], scale=100) for ratios in pairs)])
    return table(["share", *MODELS[3:]], body)


def linear_part(rows: Sequence[Row], preset: Preset) -> Iterator[str]:
    """Everything about the linear model."""
    one = preset.linear
    worst = max(row["miss"] for row in rows if row["over"] != "keep")
    yield (
        f"d = {one.features}, {one.samples} samples to keep and as many to forget, standard normal. The largest "
        f"distance of a measured loss from its closed form was {worst:.1g} of the mean squared label. Losses below "
        "1e-12 are 0."
    )
    yield f"Over the number of fine-tuning samples, {one.share:.0%} of the features shared:"
    yield "\n".join(linear_table(rows, "tuned", "samples", MODELS))
    yield f"Over the share of shared features, {one.tuned_part} fine-tuning samples:"
    yield "\n".join(linear_table(rows, "share", "share", MODELS))
    yield "The same, UL in percent of the golden model's in the same draw:"
    yield "\n".join(ratio_table(rows))
    yield (
        f"Masks made of importances, over the share of coefficients they keep; {one.share:.0%} of the features shared, "
        f"{one.tuned_part} fine-tuning samples:"
    )
    yield "\n".join(linear_table(rows, "keep", "keep", ("retain", "forget")))


def sections(rows: Sequence[Row], preset: Preset, figures: Sequence[Path]) -> Iterator[str]:
    """Everything below the marker, a paragraph or a table each.

    Args:
        rows: Rows of all jobs, with what says which job it was.
        preset: What was run.
        figures: Pictures, all in the page's folder.
    """
    pictures = {path.stem.partition("-")[2]: f"![{path.stem}]({path.name})" for path in figures}
    yield "## The linear model"
    yield from linear_part([row for row in rows if row["kind"] == "linear"], preset)
    yield pictures["linear"]
    for task in preset.tasks:
        label, of_task = task.dataset.lower(), [row for row in rows if row["task"] == task.dataset]
        groups = {
            name: [row for row in of_task if row["group"] == name] for name in ("reference", "default", "alpha", "keep")
        }
        yield f"## {task.dataset}"
        yield (
            f"{task.train:,} training, {task.val:,} validation and {task.test:,} test images, {task.epochs} epochs; "
            f"classes {', '.join(str(one) for one in preset.classes)}, each forgotten alone. Percent but for seconds "
            "and steps; means over classes, spread over seeds."
        )
        yield "\n".join(class_table(groups["reference"] + groups["default"], ["model"], ["model"]))
        yield "By class:"
        yield "\n".join(worst_class_table(groups["reference"] + groups["default"], preset, task.dataset))
        fits = [row for row in of_task if row["group"] == "fit"]
        if fits:
            yield "Fine-tuning from originals that were trained for fewer epochs:"
            yield "\n".join(fit_table(fits))
        yield (
            f"Weight of the second term, at {preset.alpha_lr_scale:g} times the learning rate and without an early end:"
        )
        yield "\n".join(class_table(groups["alpha"], ["method", "alpha"], ["model", "value"]))
        yield pictures[f"{label}-alpha"]
        yield "Share of every layer that the masks keep:"
        named = [{**row, "model": _MASKS[row["model"]]} for row in groups["keep"]]
        yield "\n".join(class_table(named, ["mask", "keep"], ["model", "value"]))
        yield pictures[f"{label}-keep"]
