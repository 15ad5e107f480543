"""Scores of predictions against decimals of hundreds of digits, scipy and written-out formulas."""

import math
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from lightning_unlearn.functional.prediction_scores import (
    attack_features,
    confidence_log_odds,
    membership_score,
    modified_entropy,
    prediction_entropy,
)


def features_of(name):
    return partial(attack_features, feature=name)


def exact_shares(logits):
    exponentials = [Decimal(value).exp() for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def exact_modified_entropy(logits, target):
    """The formula as it stands, in 700 decimal digits."""
    with localcontext() as context:
        context.prec = 700
        terms = [
            (1 - p) * p.ln() if number == target else p * (1 - p).ln()
            for number, p in enumerate(exact_shares(logits))
            if 0 < p < 1
        ]
        return float(-sum(terms))


ROWS = {
    "ordinary": [0.3, -1.2, 2.0],
    "two classes": [0.1, -0.1],
    "equal": [5.0, 5.0, 5.0, 5.0],
    "two equal on top": [40.0, 40.0, 0.0],
    "37 apart, where 1 - p rounds to 0": [37.0, 0.0, -1.0],
    "hundreds apart": [300.0, 0.0, 299.0],
    "as far as float16 goes": [600.0, -600.0, 100.0],
    "far from zero": [2000.0, 2001.0, 1990.0],
    "many small": [20.0, *[0.0] * 30],
}


@pytest.mark.parametrize("target", [0, 1, -1])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_modified_entropy_is_the_formula_in_decimals(row, target):
    target %= len(row)
    value = modified_entropy(torch.tensor([row], dtype=torch.float64), torch.tensor([target]))
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(exact_modified_entropy(row, target), rel=1e-12, abs=1e-300)


def test_modified_entropy_of_a_batch_is_that_of_its_rows():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)) * 20
    targets = torch.arange(30) % 5
    values = modified_entropy(logits, targets)
    for row in range(30):
        exact = exact_modified_entropy(logits[row].tolist(), targets[row].item())
        assert values[row].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_modified_entropy_of_every_dtype_is_float64_and_finite(dtype):
    huge = torch.finfo(dtype).max / 4
    logits = torch.tensor([[huge, -huge, 0.0], [0.0, 1.0, 2.0]], dtype=dtype)
    for target in range(3):
        value = modified_entropy(logits, torch.tensor([target, target]))
        assert value.dtype == torch.float64
        assert value.isfinite().all()
        assert value[0] == (0 if target == 0 else pytest.approx((huge if target == 2 else 2 * huge) + huge, rel=1e-6))
    assert torch.equal(
        modified_entropy(logits[1:], torch.tensor([2])), modified_entropy(logits[1:].double(), torch.tensor([2]))
    )


def test_modified_entropy_falls_in_the_probability_of_the_true_class():
    logits = torch.stack([torch.linspace(-50, 50, 101), torch.zeros(101), torch.ones(101)], dim=1)
    assert (modified_entropy(logits, torch.zeros(101, dtype=torch.long)).diff() < 0).all()


def test_an_excluded_class_counts_for_nothing_unless_it_is_the_true_one():
    masked, plain = torch.tensor([[1.0, -math.inf, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert modified_entropy(masked, torch.tensor([2])) == modified_entropy(plain, torch.tensor([1]))
    assert modified_entropy(masked, torch.tensor([1])).item() == math.inf
    only = torch.tensor([[0.0, -math.inf]])
    assert modified_entropy(only, torch.tensor([0])).item() == 0
    assert modified_entropy(only, torch.tensor([1])).item() == math.inf


@pytest.mark.parametrize(
    ("logits", "targets", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), r"`targets` to be integers of shape \(3,\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "`logits` to be of shape"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "C of at least 2"),
        (torch.zeros(1, 2), torch.zeros(1), "`targets` to be integers"),
        (torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long), "`logits` to be floating"),
        (torch.zeros(2, 2), torch.tensor([1, 2]), "class numbers below 2, but got 'class 2'"),
        (torch.zeros(2, 2), torch.tensor([-100, 1]), "class -100"),
        (torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([0, 0]), "finite maximum, but got '1 other"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "finite maximum, but got '1 other"),
        (torch.tensor([[-math.inf, -math.inf]]), torch.tensor([0]), "finite maximum, but got '1 other"),
    ],
)
@pytest.mark.parametrize("function", [modified_entropy, confidence_log_odds, features_of("correctness")])
def test_refuses_by_name(function, logits, targets, match):
    with pytest.raises(ValueError, match=match):
        function(logits, targets)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_entropy_and_log_odds_are_the_formulas_in_decimals(row):
    logits = torch.tensor([row], dtype=torch.float64)
    with localcontext() as context:
        context.prec = 1200
        shares = exact_shares(row)
        exact = float(-sum(p * p.ln() for p in shares))
        odds = [float((p / (1 - p)).ln()) for p in shares]
    assert prediction_entropy(logits).item() == pytest.approx(exact, rel=1e-12, abs=1e-300)
    for target, value in enumerate(odds):
        assert confidence_log_odds(logits, torch.tensor([target])).item() == pytest.approx(value, rel=1e-12, abs=1e-12)


def test_entropy_of_a_batch_equals_scipy_and_an_excluded_class_has_none():
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    logits[:10, 2] = -math.inf
    oracle = entropy(softmax(logits.numpy(), axis=1), axis=1)
    torch.testing.assert_close(prediction_entropy(logits), torch.from_numpy(oracle), rtol=1e-12, atol=0)
    assert prediction_entropy(torch.tensor([[1.0, -math.inf]])).item() == 0


@pytest.mark.parametrize("score", ["loss", "confidence", "entropy", "modified_entropy"])
def test_a_sure_right_answer_looks_more_like_a_member_than_an_unsure_one(score):
    logits = torch.tensor([[5.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    values = membership_score(logits, torch.zeros(3, dtype=torch.long), score)
    assert values.dtype == torch.float64
    assert values[0] > values[1] > values[2]
    wrong = membership_score(torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([1]), score)
    assert (wrong > values[2]) == (score == "entropy"), "only entropy does not know the label"


def test_loss_and_confidence_order_samples_alike_and_confidence_resolves_more():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(3)) * 4
    targets = torch.arange(50) % 4
    loss, confidence = (membership_score(logits, targets, score) for score in ("loss", "confidence"))
    assert torch.equal(loss.argsort(), confidence.argsort())
    sure = torch.tensor([[50.0, 0.0], [60.0, 0.0]])
    assert membership_score(sure, torch.zeros(2, dtype=torch.long), "confidence").tolist() == [50, 60]


def test_features_are_on_the_scale_of_the_papers():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    targets = torch.arange(40) % 4
    shares = torch.from_numpy(softmax(logits.numpy(), axis=1))
    true = shares[range(40), targets]
    oracles = {
        "correctness": (shares.max(dim=1).indices == targets).double(),
        "confidence": true,
        "entropy": torch.from_numpy(entropy(shares.numpy(), axis=1)),
        "modified_entropy": torch.tensor(
            [
                -sum(
                    (1 - p) * math.log(p) if k == y else p * math.log(1 - p) for k, p in enumerate(shares[row].tolist())
                )
                for row, y in enumerate(targets.tolist())
            ],
            dtype=torch.float64,
        ),
    }
    for name, oracle in oracles.items():
        torch.testing.assert_close(attack_features(logits, targets, name), oracle.unsqueeze(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(attack_features(logits, targets, "probabilities"), shares, rtol=1e-12, atol=0)


def test_refuses_other_names():
    with pytest.raises(ValueError, match=r"score.*'loss', 'confidence'"):
        membership_score(torch.zeros(1, 2), torch.tensor([0]), "margin")
    with pytest.raises(ValueError, match=r"feature.*'correctness'"):
        attack_features(torch.zeros(1, 2), torch.tensor([0]), "loss")
