"""Many models side by side, against numbers written out by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_unlearn.procedures.compare import compare_models
from lightning_unlearn.procedures.evaluate import evaluate
from tests.helpers.recorded import XYClassifier, datasets


@pytest.fixture
def case():
    models = {}
    for seed, name in enumerate(("one", "two", "right")):
        torch.manual_seed(seed)
        models[name] = XYClassifier().eval()
    train, test = datasets()
    x, y = train.tensors
    data = {
        "forget": [(x[:20], y[:20])],
        "retain": [(x[20:40], y[20:40]), (x[40:], y[40:])],
        "test": [test.tensors],
    }
    return models, data


def softmax(model, x):
    with torch.no_grad():
        return torch.softmax(model(x).double(), dim=1).numpy()


def test_numbers(case):
    models, data = case
    truth = (data["forget"][0][1] + 1) % 3
    found = compare_models(models, data, reference="right", true_targets=truth)
    assert list(found) == ["one", "two", "right"]
    for name, model in models.items():
        p = {split: np.concatenate([softmax(model, x) for x, _ in parts]) for split, parts in data.items()}
        q = {split: np.concatenate([softmax(models["right"], x) for x, _ in parts]) for split, parts in data.items()}
        y = {split: np.concatenate([labels.numpy() for _, labels in parts]) for split, parts in data.items()}
        for split in data:
            assert found[name][f"{split}_accuracy"] == pytest.approx((p[split].argmax(1) == y[split]).mean())
        assert found[name]["true_label_accuracy"] == pytest.approx((p["forget"].argmax(1) == truth.numpy()).mean())
        for split in ("forget", "test"):
            kl = (q[split] * np.log(q[split] / p[split])).sum(1).mean()
            assert found[name][f"{split}_kl"] == pytest.approx(kl, abs=1e-6)
        scores = {split: np.log(p[split][np.arange(len(y[split])), y[split]]) for split in ("forget", "test")}
        member = np.r_[np.ones(20), np.zeros(len(y["test"]))]
        auroc = roc_auc_score(member, np.r_[scores["forget"], scores["test"]])
        assert found[name]["membership_auroc"] == pytest.approx(auroc)
        gaps = [
            (a - b).detach().double() for a, b in zip(model.parameters(), models["right"].parameters(), strict=True)
        ]
        assert found[name]["verification_error"] == pytest.approx(float(sum((g**2).sum() for g in gaps)) ** 0.5)


def test_agrees_with_evaluate(case):
    models, data = case
    found = compare_models(models, data, reference="right")
    result = evaluate(models["one"], models["two"], retrained=models["right"], data=data)
    for metric, value in found["two"].items():
        assert result.value(metric) == pytest.approx(value)


def test_unknown_reference(case):
    models, data = case
    with pytest.raises(ValueError, match="one of 'one', 'two', 'right'"):
        compare_models(models, data, reference="twin")
