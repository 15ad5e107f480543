"""Sections of a report that follow from evaluations: the comparison of several methods, and what it does not show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lightning_unlearn.report.certainty import certainty_tables
from lightning_unlearn.report.content import Cell, Column, Figure, Row, RowKind, Section, Table
from lightning_unlearn.report.figures import Panel, bar_figure, dot_figure
from lightning_unlearn.results import EvaluationResult, ModelRole

__all__ = ["METRIC_COLUMNS", "outcome_words", "results_section", "say_and_do_not_say"]

METRIC_COLUMNS: dict[str, Column] = {
    name: Column(name, header, factor, decimals, words)
    for name, header, factor, decimals, words in (
        ("forget_accuracy", "forget %", 100, 0, "Accuracy on the forgotten samples, by the labels they came with."),
        ("true_label_accuracy", "true label %", 100, 0, "Accuracy on the forgotten samples, by their true labels."),
        ("retain_accuracy", "retain %", 100, 1, "Accuracy on the training samples that stay."),
        ("test_accuracy", "test %", 100, 1, "Accuracy on held-out samples."),
        ("forget_loss", "loss forget", 1, 2, "Cross-entropy on the forgotten samples, in nats."),
        ("forget_confidence", "confidence %", 100, 0, "Probability given to the forgotten samples' labels."),
        ("tug_of_war", "ToW", 1, 3, "Product of one minus each accuracy's gap to the retrained model; 1 is agreement."),
        ("average_gap", "average gap %", 100, 1, "Mean gap of the three accuracies to the retrained model's."),
        ("forget_kl", "KL forget", 1, 2, "Divergence from the retrained model's answers on the forgotten samples."),
        ("forget_js", "JS forget", 1, 3, "The same as a symmetric divergence, at most ln 2."),
        ("forget_activation_distance", "activ. dist.", 1, 3, "Distance between both models' probabilities."),
        ("test_kl", "KL test", 1, 3, "Divergence from the retrained model's answers on held-out samples."),
        ("membership_auroc", "AUROC", 1, 2, "How well an attacker tells forgotten samples from held-out ones."),
        ("confidence_auroc", "AUROC conf.", 1, 2, "The same by the confidence; with the loss, one piece of evidence."),
        ("modified_entropy_auroc", "AUROC m-entropy", 1, 2, "The same by an entropy that knows the label."),
        ("verification_error", "verif. error", 1, 2, "Distance to the retrained weights; decides nothing."),
    )
}
"""How the metrics of an evaluation are shown; others follow with two decimals."""

Arms = Mapping[str, Sequence[EvaluationResult]]


def outcome_words(results: Sequence[EvaluationResult]) -> str:
    """What was concluded, repetition by repetition, such as `forgotten (2 of 3), not specific (1 of 3)`."""
    counts = Counter(result.outcome for result in results)
    if len(results) == 1:
        return results[0].outcome.replace("_", " ")
    return ", ".join(f"{name.replace('_', ' ')} ({count} of {len(results)})" for name, count in counts.most_common())


def _checked(arms: Arms) -> list[EvaluationResult]:
    if not arms or not all(arms.values()):
        empty = [name for name, results in arms.items() if not results]
        raise ValueError(
            f"Expected `arms` to hold at least one evaluation for each method, but got {empty or 'no arm'}."
        )
    return [result for results in arms.values() for result in results]


def _values(results: Sequence[EvaluationResult], metric: str, model: ModelRole) -> list[float]:
    return [row.value for result in results for row in result.rows if (row.name, row.model) == (metric, model)]


def _lines(arms: Arms) -> list[tuple[str, Sequence[EvaluationResult], ModelRole, RowKind]]:
    """Rows of the comparison: the references once, since all arms share them, and a placebo beside its arm."""
    first = next(iter(arms.values()))
    lines: list[tuple[str, Sequence[EvaluationResult], ModelRole, RowKind]] = [
        ("original", first, "original", "reference")
    ]
    if _values(first, "forget_accuracy", "retrained"):
        lines.append(("retrained", first, "retrained", "reference"))
    for name, results in arms.items():
        lines.append((name, results, "unlearned", "method"))
        if _values(results, "forget_accuracy", "placebo"):
            lines.append((f"placebo of {name}", results, "placebo", "control"))
    return lines


def results_section(title: str, arms: Arms, *, paragraphs: Sequence[str] = ()) -> Section:
    """Table, verdicts and figures that compare several methods against the same original and retrained models.

    Args:
        title: Heading.
        arms: Name of a method -> its evaluations, one a seed.
        paragraphs: Words to put first; by default the verdicts in one paragraph.

    Returns:
        The section.

    Raises:
        ValueError: there is no arm, or an arm without an evaluation.
    """
    results = _checked(arms)
    lines = _lines(arms)
    metrics = dict.fromkeys(name for result in results for name in result.metrics())
    labels = {name: label for result in results for name, label in result.metrics().items()}
    columns = [METRIC_COLUMNS[name] for name in METRIC_COLUMNS if name in metrics]
    columns += [Column(name, labels[name]) for name in metrics if name not in METRIC_COLUMNS]
    rows = []
    for label, found, model, kind in lines:
        cells: dict[str, Cell | str] = {}
        for column in columns:
            values = _values(found, column.name, model)
            if values:
                cells[column.name] = Cell.of(values)
        rows.append(Row(label, cells, kind))
    seeds = max(len(found) for found in arms.values())
    note = (
        f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One run; no spread between runs is known."
    )
    note += " The right value of every column is the retrained model's."
    tables = [Table("Every model, every metric", tuple(columns), tuple(rows), note), _verdict_table(arms)]
    for name, found in arms.items():
        heading = f"How sure the numbers of {name} are" + (" (first seed)" if len(found) > 1 else "")
        tables += certainty_tables(heading, found[0], METRIC_COLUMNS)
    words = tuple(paragraphs) or (_verdict_paragraph(arms),)
    first = "" if seeds == 1 else " (first seed)"
    verdicts = tuple(f"{name}{first}: {found[0].verdict}" for name, found in arms.items())
    return Section(title, words, tuple(_figures(lines)), tuple(tables), verdicts)


def _verdict_table(arms: Arms) -> Table:
    columns = (
        Column("outcome", "conclusion", text=True),
        Column("removed", "removed %", 100, 0),
        Column("removed_by_placebo", "by the placebo %", 100, 0),
        Column("seconds", "seconds", 1, 2),
    )
    rows = []
    for name, results in arms.items():
        cells: dict[str, Cell | str] = {"outcome": outcome_words(results)}
        for column, values in (
            ("removed", [result.removed for result in results]),
            ("removed_by_placebo", [result.removed_by_placebo for result in results]),
            ("seconds", [result.costs.get("unlearning_seconds") for result in results]),
        ):
            known = [value for value in values if value is not None]
            if known:
                cells[column] = Cell.of(known)
        rows.append(Row(name, cells))
    note = "Removed: the share of what the original had memorised that is gone; more than 100 % is over-forgetting."
    return Table("What follows", columns, tuple(rows), note)


def _verdict_paragraph(arms: Arms) -> str:
    results = _checked(arms)
    nothing = sum(result.something_to_forget is False for result in results)
    start = ""
    if nothing == len(results):
        start = (
            "The original had not measurably memorised the samples, so there was nothing that forgetting could show. "
        )
    elif nothing:
        start = f"In {nothing} of {len(results)} comparisons there was nothing measurable to forget. "
    return start + "; ".join(f"{name}: {outcome_words(found)}" for name, found in arms.items()) + "."


def _figures(lines: Sequence[tuple[str, Sequence[EvaluationResult], ModelRole, RowKind]]) -> list[Figure]:
    muted = [label for label, _, _, kind in lines if kind != "method"]

    def panel(metric: str, title: str, factor: float, limits: tuple[float, float] | None) -> Panel:
        values = {label: [factor * v for v in _values(found, metric, model)] for label, found, model, _ in lines}
        right = values.get("retrained", [])
        return Panel(title, values, sum(right) / len(right) if right else None, limits)

    dots = [
        panel("forget_accuracy", "Forget accuracy, %", 100, (0, 100)),
        panel("test_accuracy", "Test accuracy, %", 100, None),
    ]
    caption = "Large dots are means, small ones single seeds. The dashed line is the retrained model: the place to be."
    figures = [dot_figure("Forgotten, and at what price", dots, muted=muted, caption=caption)]
    distance = panel("forget_kl", "KL(retrained || model) on the forget set, nats", 1, None)
    if any(distance.values.values()):
        shown = {label: values for label, values in distance.values.items() if label != "retrained"}
        caption = "Shorter is better. Whiskers are one standard deviation over seeds."
        figures.append(
            bar_figure(
                "Distance from the retrained model's answers",
                Panel(distance.title, shown),
                muted=muted,
                caption=caption,
            )
        )
    return figures


def say_and_do_not_say(arms: Arms) -> Section:
    """What stands between the numbers and a conclusion: the evaluations' warnings and notes, each once."""
    results = _checked(arms)
    remarks = dict.fromkeys(text for result in results for text in (*result.warnings, *result.notes))
    fixed = (
        "Unlearning by editing weights is approximate: none of these numbers proves that no trace is left. They show "
        "whether this model answers like one that never saw the samples, on the samples and metrics listed, and "
        "whether an attack on the loss can tell. A stronger attack may see more."
    )
    return Section("What the numbers do not say", (fixed,), remarks=tuple(remarks))
