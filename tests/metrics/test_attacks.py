"""Attacks as metrics: they are their functions, whatever the order of batches, and refuse what cannot be meant."""

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_unlearn.functional.classifier_attacks import entropy_attack, logistic_attack, support_vector_attack
from lightning_unlearn.functional.membership import cross_entropy_per_sample
from lightning_unlearn.functional.prediction_scores import attack_features, membership_score, prediction_entropy
from lightning_unlearn.metrics import (
    EntropyAttack,
    LogisticAttack,
    LossThresholdAttack,
    SupportVectorAttack,
    ThresholdAttack,
)

SCORES = ("loss", "confidence", "entropy", "modified_entropy")
FEATURES = ("correctness", "confidence", "entropy", "modified_entropy", "probabilities")


def outputs(count, sureness, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 4
    logits = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return logits + sureness * torch.nn.functional.one_hot(targets, 4), targets


PARTS = {"forget": outputs(80, 2.0, 0), "retain": outputs(150, 3.0, 1), "test": outputs(100, 1.0, 2)}
LOSSES = {split: cross_entropy_per_sample(*part) for split, part in PARTS.items()}


def filled(metric, parts, splits=("forget", "retain", "test"), batch=29):
    """All batches of some splits, in float64."""
    metric.set_dtype(torch.float64)
    for split in splits:
        for batches in zip(*(column.split(batch) for column in parts[split]), strict=True):
            metric.update(*batches, split=split)
    return metric


HELD_OUT = ("test", "forget")


@pytest.mark.parametrize("score", SCORES)
def test_threshold_attack_is_scikit_learns_curve_of_the_score(score):
    value = filled(ThresholdAttack(score=score), PARTS, HELD_OUT).compute()
    truth = [1] * 80 + [0] * 100
    scores = torch.cat([membership_score(*PARTS[split], score) for split in ("forget", "test")])
    assert value["membership_auroc"].item() == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    accused, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    for rate, name in ((0.01, "1e-2"), (0.001, "1e-3")):
        assert value[f"membership_tpr_at_{name}_fpr"].item() == pytest.approx(found[accused <= rate].max(), abs=1e-12)
    assert value["membership_accuracy"].item() == pytest.approx((found - accused).max() / 2 + 0.5, abs=1e-12)
    assert 0.6 < value["membership_auroc"] < 0.85


def test_threshold_on_the_loss_is_the_loss_threshold_attack():
    by_loss = filled(LossThresholdAttack(), {split: (losses,) for split, losses in LOSSES.items()}, HELD_OUT)
    assert filled(ThresholdAttack(), PARTS, HELD_OUT).compute() == by_loss.compute()


@pytest.mark.parametrize("options", [{}, {"n_splits": 5, "clip": 100.0}, {"seed": 4}, {"clip": 0.5}])
def test_logistic_attack_is_the_mean_of_the_function(options):
    metric = filled(LogisticAttack(**options), {split: (losses,) for split, losses in LOSSES.items()}, HELD_OUT)
    assert metric.compute() == logistic_attack(LOSSES["forget"], LOSSES["test"], **options).mean()
    assert metric.compute().dtype == torch.float64


def test_options_of_the_logistic_attack_make_a_difference():
    parts = {split: (losses,) for split, losses in LOSSES.items()}
    options = ({}, {"n_splits": 5}, {"seed": 4}, {"clip": 0.5})
    assert len({filled(LogisticAttack(**chosen), parts, HELD_OUT).compute().item() for chosen in options}) == 4


@pytest.mark.parametrize("feature", FEATURES)
def test_support_vector_attack_is_its_function(feature):
    metric = filled(SupportVectorAttack(feature=feature, seed=2), PARTS)
    features = {split: attack_features(*part, feature) for split, part in PARTS.items()}
    shares = support_vector_attack(**features, seed=2)
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "forget_member_share": shares.forget,
        "retain_member_share": shares.retain,
        "test_member_share": shares.test,
    }
    assert metric.efficacy.item() == shares.efficacy


def test_entropy_attack_is_its_function():
    metric = filled(EntropyAttack(), {split: (logits,) for split, (logits, _) in PARTS.items()})
    shares = entropy_attack(**{split: prediction_entropy(logits) for split, (logits, _) in PARTS.items()})
    assert metric.compute()["forget_member_share"].item() == shares.forget
    assert metric.efficacy.item() == shares.efficacy
    assert shares.test < shares.forget < shares.retain


@pytest.mark.parametrize("metric", [ThresholdAttack(score="entropy"), SupportVectorAttack(feature="probabilities")])
def test_the_order_of_splits_and_the_size_of_batches_do_not_matter(metric):
    splits = HELD_OUT if isinstance(metric, ThresholdAttack) else ("forget", "retain", "test")
    value = filled(metric.clone(), PARTS, splits).compute()
    assert filled(metric.clone(), PARTS, splits[::-1], batch=7).compute() == value


def test_samples_are_kept_in_the_dtype_of_the_metric():
    logits, targets = PARTS["forget"]
    entropies, losses = prediction_entropy(logits), LOSSES["forget"]
    for dtype in (torch.float32, torch.float64):
        by_entropy, by_loss = EntropyAttack(), ThresholdAttack()
        for metric in (by_entropy, by_loss):
            metric.set_dtype(dtype)
        by_entropy.update(logits, split="forget")
        by_loss.update(logits, targets, split="forget")
        assert torch.equal(by_entropy.forget[0], entropies.to(dtype))
        assert torch.equal(by_loss.member_losses[0], losses.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_count_for_what_they_are(dtype):
    half = {split: (logits.to(dtype), targets) for split, (logits, targets) in PARTS.items()}
    exact = {split: (logits.double(), targets) for split, (logits, targets) in half.items()}
    for metric, splits in ((ThresholdAttack(), HELD_OUT), (SupportVectorAttack(), ("forget", "retain", "test"))):
        assert filled(metric.clone(), half, splits).compute() == filled(metric.clone(), exact, splits).compute()


@pytest.mark.parametrize(
    ("metric", "samples"),
    [(ThresholdAttack(), PARTS["retain"]), (LogisticAttack(), (LOSSES["retain"],))],
    ids=lambda value: type(value).__name__,
)
def test_retain_samples_are_refused_as_nonmembers(metric, samples):
    with pytest.raises(ValueError, match="retain samples, so they cannot stand for non-members"):
        metric.update(*samples, split="retain")
    assert metric.nonmember_losses == metric.member_losses == []
    with pytest.raises(ValueError, match=r"'forget' .members. or 'test'"):
        metric.update(*samples, split="train")


@pytest.mark.parametrize("metric", [SupportVectorAttack(), EntropyAttack()], ids=lambda metric: type(metric).__name__)
def test_classifier_attacks_name_the_split_that_is_missing(metric):
    samples = 1 if isinstance(metric, EntropyAttack) else 2
    with pytest.raises(ValueError, match=r"split.*'forget', 'retain', 'test'"):
        metric.update(*PARTS["test"][:samples], split="train")
    metric.update(*PARTS["test"][:samples], split="test")
    metric.update(*PARTS["forget"][:samples], split="forget")
    with pytest.raises(ValueError, match=r"`retain` to be of shape .* at least 10, but got \(0,\)"):
        metric.compute()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ThresholdAttack(score="margin"), "score"),
        (lambda: ThresholdAttack(min_samples=0), "min_samples"),
        (lambda: LogisticAttack(n_splits=0), "n_splits"),
        (lambda: LogisticAttack(clip=0), "clip"),
        (lambda: LogisticAttack(seed=-1), "seed"),
        (lambda: SupportVectorAttack(feature="loss"), "feature"),
        (lambda: SupportVectorAttack(seed=-1), "seed"),
    ],
)
def test_refuses_options(build, match):
    with pytest.raises(ValueError, match=f"`{match}`"):
        build()


def test_too_few_samples_give_no_number():
    metric = ThresholdAttack()
    metric.update(PARTS["forget"][0][:9], PARTS["forget"][1][:9], split="forget")
    metric.update(*PARTS["test"], split="test")
    with pytest.raises(ValueError, match="at least 10 members"):
        metric.compute()
