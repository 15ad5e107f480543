"""The demo's report: what was asked, what was done, four comparisons, and what the numbers do not say."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lightning_unlearn.__about__ import __version__
from lightning_unlearn.demo.arm import ARMS, CONTRIBUTORS, EPOCHS, REPAIR_STEPS, ArmResult, Placement
from lightning_unlearn.demo.story import METRICS, arms_of, outcomes, story, summary, values
from lightning_unlearn.report import (
    Cell,
    Column,
    Figure,
    Panel,
    Row,
    Section,
    Table,
    UnlearningReport,
    bar_figure,
    dot_figure,
    say_and_do_not_say,
)
from lightning_unlearn.report.content import RowKind

__all__ = ["build_report"]

_REFERENCES = ("original", "retrained twin", "independent retraining")
_WHAT = {
    "mislabelled": "20 images whose labels were all wrong",
    "clean": "20 ordinary images with right labels",
}
_HELP = {
    "forget_accuracy": "Share of the contributor's images that get the label they came with.",
    "true_label_accuracy": "Share of the contributor's images that get their true label.",
    "retain_accuracy": "Accuracy on all other training images.",
    "test_accuracy": "Accuracy on held-out images.",
    "forget_kl": "Divergence from the twin's answers on the contributor's images, nats.",
    "test_kl": "Divergence from the twin's answers on held-out images, nats.",
    "membership_auroc": "How well an attacker tells the contributor's images from held-out ones by their loss.",
    "verification_error": "Distance to the twin's weights; decides nothing.",
    "seconds": "Wall time: training, retraining, or the forgetting pass with its probes.",
}


def build_report(results: Sequence[ArmResult], seconds: float) -> UnlearningReport:
    """Put the arms together; `seconds` is how long the demo took."""
    seeds = len(arms_of(results, "grouped"))
    asked = (
        f"Two contributors asked to be forgotten: one gave {_WHAT['mislabelled']}, the other {_WHAT['clean']}. The "
        "model is a small convolutional network with BatchNorm, trained on 1,438 of scikit-learn's digits for "
        f"{EPOCHS} epochs."
    )
    repeated = f"{seeds} seeds each" if seeds > 1 else "one seed"
    done = (
        "Training was recorded once with a contributor's images in shared batches (grouped) and once with ordinary "
        f"shuffling (random), {repeated}. Every method ran on the same original. Repair is {REPAIR_STEPS} steps of the "
        "user's own training on the remaining data at a third of the learning rate; BatchNorm statistics are "
        "re-estimated after each subtraction. The placebo is the same subtraction for an innocent bystander's 20 "
        "images. The twin was retrained from the same initial weights on the same batches without the contributor's "
        "images; a second retraining from other initial weights shows how much two retrainings differ. Plans that "
        "refused were forced, to show what they warn of."
    )
    sections = [
        Section("In plain words", tuple(story(results))),
        Section("What was asked", (asked,)),
        Section("What was done", (done,), tables=(_plans(results),)),
    ]
    sections += [_comparison(results, placement, contributor) for contributor in CONTRIBUTORS for placement in ARMS]
    sections.append(
        say_and_do_not_say(
            {
                f"{contributor}, {label}": [arm.verdicts[contributor][label] for arm in results]
                for contributor in CONTRIBUTORS
                for label in results[0].verdicts[contributor]
            }
        )
    )
    metadata = {
        "lightning-unlearn": __version__,
        "seeds": ", ".join(str(arm.seed) for arm in arms_of(results, "grouped")),
        "demo took": f"{seconds:.0f} s",
    }
    return UnlearningReport("Forgetting two contributors", summary(results), tuple(sections), metadata)


def _plans(results: Sequence[ArmResult]) -> Table:
    columns = (
        Column("touched_fraction", "touched steps %", 100, 1, "Share of all training steps with an image of theirs."),
        Column("relative_norm", "relative norm", 1, 3, "Size of the subtraction against the whole way of the weights."),
        Column("mean_share", "share of batch %", 100, 0, "Their share of the touched batches."),
        Column("collateral", "others touched", 1, 0, "Innocent images in the touched steps."),
        Column("damage", "damage", text=True),
        Column("specificity", "specificity", text=True),
        Column("store", "store, MB", 1e-6, 1, "Size on disk with every delta whole (keep = 1)."),
    )
    rows = []
    for contributor in CONTRIBUTORS:
        for placement in ARMS:
            arms = arms_of(results, placement)
            cells: dict[str, Cell | str] = {
                name: Cell.of([float(arm.plans[contributor][name]) for arm in arms])
                for name in ("touched_fraction", "relative_norm", "mean_share", "collateral")
            }
            for name in ("damage", "specificity"):
                cells[name] = " / ".join(sorted({str(arm.plans[contributor][name]) for arm in arms}))
            cells["store"] = Cell.of([float(arm.store_bytes) for arm in arms])
            rows.append(Row(f"{contributor}, {placement}", cells))
    return Table("What the plans said before anything changed (Amnesiac)", columns, tuple(rows))


def _comparison(results: Sequence[ArmResult], placement: Placement, contributor: str) -> Section:
    labels = list(dict.fromkeys(row.label for arm in arms_of(results, placement) for row in arm.rows))
    columns = [Column(name, *METRICS[name], help=_HELP[name]) for name in METRICS]
    rows = []
    for label in labels:
        cells: dict[str, Cell | str] = {
            name: Cell.of(values(results, placement, contributor, label, name)) for name in METRICS
        }
        rows.append(Row(label, cells, _kind(label)))
    seeds = len(arms_of(results, placement))
    repeated = f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."
    note = f"{repeated} The right value of every column is the retrained twin's."
    first = arms_of(results, placement)[0]
    advice = f"The plan's advice for Amnesiac (first seed): {first.plans[contributor]['recommendation']}"
    verdicts = Table(
        "What the evidence allows to be said",
        (Column("outcome", "conclusion, by seeds", text=True), Column("words", "in words (first seed)", text=True)),
        tuple(
            Row(label, {"outcome": outcomes(results, placement, contributor, label), "words": result.verdict})
            for label, result in first.verdicts[contributor].items()
        ),
    )
    return Section(
        f"The {contributor} contributor, {placement} placement",
        (advice,),
        tuple(_figures(results, placement, contributor, labels)),
        (Table("Every model", tuple(columns), tuple(rows), note), verdicts),
    )


def _kind(label: str) -> RowKind:
    if label in _REFERENCES:
        return "reference"
    return "control" if label.startswith("placebo") else "method"


def _figures(
    results: Sequence[ArmResult], placement: Placement, contributor: str, labels: Sequence[str]
) -> list[Figure]:
    def panel(metric: str, title: str, limits: tuple[float, float] | None = None) -> Panel:
        factor = METRICS[metric][1]
        shown: Mapping[str, list[float]] = {
            label: [factor * value for value in values(results, placement, contributor, label, metric)]
            for label in labels
        }
        return Panel(title, shown, statistics.mean(shown["retrained twin"]), limits)

    muted = [label for label in labels if _kind(label) != "method"]
    where = f"{contributor}, {placement}"
    dots = [
        panel("forget_accuracy", "gets the label it came with, %", (0, 100)),
        panel("test_accuracy", "test accuracy, %"),
    ]
    distance = panel("forget_kl", "KL(twin || model) on the contributor's images, nats")
    shown = {label: found for label, found in distance.values.items() if label != "retrained twin"}
    return [
        dot_figure(
            f"Forgotten, and at what price ({where})",
            dots,
            muted=muted,
            caption="Large dots are means, small ones single seeds. The dashed line is the retrained twin.",
        ),
        bar_figure(
            f"Distance from the twin's answers ({where})",
            Panel(distance.title, shown),
            muted=muted,
            caption="Shorter is better. Whiskers are one standard deviation over seeds.",
        ),
    ]
