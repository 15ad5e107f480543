"""Evaluations made of given numbers, for reports that only read them."""

from lightning_unlearn.results import EvaluationResult, MetricValue

LABELS = {
    "forget_accuracy": ("Accuracy on the forget set", "forget", "retrained"),
    "test_accuracy": ("Accuracy on held-out data", "test", "retrained"),
    "forget_kl": ("KL(retrained || model)", "forget", "low"),
    "own_metric": ("A metric <of> a later release", None, "high"),
}


def evaluation(values, outcome="forgotten", **changes):
    """`values`: metric -> model -> number."""
    rows = tuple(
        MetricValue(name, LABELS[name][0], model, LABELS[name][1], value, None, None, LABELS[name][2], None, "words")
        for name, models in values.items()
        for model, value in models.items()
    )
    models = tuple(dict.fromkeys(row.model for row in rows))
    fields = {
        "something_to_forget": True,
        "verdict": f"Verdict {outcome}.",
        "removed": 0.9,
        "notes": ("A note.",),
        "warnings": ("A warning.",),
        **changes,
    }
    return EvaluationResult(rows, models, {"forget": 20, "test": 360}, outcome=outcome, **fields)


def models(original, unlearned, retrained, placebo=None):
    found = {"original": original, "unlearned": unlearned, "retrained": retrained}
    return found if placebo is None else {**found, "placebo": placebo}


def seeds():
    """Two methods, three seeds; the second one has no placebo."""

    def one(seed, unlearned, placebo, outcome):
        forget = models(0.8 + seed / 100, unlearned, 0.0, placebo)
        test = models(0.98, 0.97, 0.99, None if placebo is None else 0.96)
        kl = models(1.2, 0.1, 0.0, None if placebo is None else 0.5)
        values = {"forget_accuracy": forget, "test_accuracy": test, "forget_kl": kl, "own_metric": models(1, 2, 3)}
        return evaluation(values, outcome, costs={"unlearning_seconds": 1.0 + seed})

    return {
        "amnesiac": [one(seed, 0.1 * seed, 0.6, "forgotten" if seed else "partly_forgotten") for seed in range(3)],
        "fine-tune": [one(seed, 0.3, None, "unconfirmed") for seed in range(3)],
    }
