"""Classifier attacks against pipelines written anew, and models that did and did not see the samples."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score
from sklearn.svm import SVC

from lightning_unlearn.functional.classifier_attacks import (
    MemberShares,
    entropy_attack,
    logistic_attack,
    support_vector_attack,
)
from lightning_unlearn.functional.membership import cross_entropy_per_sample, threshold_attack
from lightning_unlearn.functional.prediction_scores import attack_features, membership_score, prediction_entropy
from tests.helpers.overfitted import noisy_digits, overfitted


def drawn(count, scale, seed, columns=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (count,) if columns is None else (count, columns)
    return torch.randn(shape, generator=generator, dtype=torch.float64).exp() * scale


MEMBERS, NONMEMBERS = drawn(60, 1.0, 0), drawn(60, 2.0, 1)
FORGET, RETAIN, TEST = drawn(200, 1.5, 2), drawn(90, 1.0, 3), drawn(90, 2.5, 4)
PARTS = {"forget": FORGET, "retain": RETAIN, "test": TEST}


def as_sklearn(members, nonmembers):
    features = np.concatenate([np.sort(members.numpy()), np.sort(nonmembers.numpy())])
    return features.reshape(-1, 1), np.r_[np.ones(len(members)), np.zeros(len(nonmembers))]


@pytest.mark.parametrize(("n_splits", "clip"), [(5, 100.0), (10, None), (4, 1.5)])
def test_logistic_attack_is_scikit_learns_cross_validation(n_splits, clip):
    features, labels = as_sklearn(MEMBERS, NONMEMBERS)
    features = features if clip is None else np.clip(features, -clip, clip)
    splits = StratifiedShuffleSplit(n_splits=n_splits, random_state=7)
    oracle = cross_val_score(LogisticRegression(), features, labels, cv=splits, scoring="accuracy")
    values = logistic_attack(MEMBERS, NONMEMBERS, n_splits=n_splits, clip=clip, seed=7)
    assert values.dtype == torch.float64
    assert values.tolist() == oracle.tolist()
    assert 0.5 < values.mean() < 0.8


def test_logistic_attack_is_the_written_out_loop():
    features, labels = as_sklearn(MEMBERS, NONMEMBERS)
    accuracies = []
    for train, left_out in StratifiedShuffleSplit(n_splits=6, test_size=0.1, random_state=3).split(features, labels):
        fitted = LogisticRegression().fit(features[train], labels[train])
        member = features[left_out, 0] * fitted.coef_[0, 0] + fitted.intercept_[0] > 0
        accuracies.append(sum(member == (labels[left_out] == 1)) / len(left_out))
    assert logistic_attack(MEMBERS, NONMEMBERS, n_splits=6, seed=3).tolist() == pytest.approx(accuracies, abs=1e-12)


@pytest.mark.parametrize("larger", ["members", "nonmembers"])
def test_the_larger_group_is_sampled_to_the_size_of_the_smaller(larger):
    many = np.sort(drawn(300, 1.0, 5).numpy())
    kept = torch.from_numpy(np.random.default_rng(11).choice(many, 60, replace=False))
    assert len(kept.unique()) == 60
    pair, balanced = (
        ((torch.from_numpy(many), NONMEMBERS), (kept, NONMEMBERS))
        if larger == "members"
        else ((MEMBERS, torch.from_numpy(many)), (MEMBERS, kept))
    )
    assert logistic_attack(*pair, seed=11).tolist() == logistic_attack(*balanced, seed=11).tolist()
    assert logistic_attack(*pair, seed=11).tolist() != logistic_attack(*pair, seed=12).tolist()


def test_unequal_groups_of_one_distribution_give_one_half_and_not_the_larger_share():
    accuracy = logistic_attack(drawn(300, 1.0, 6), drawn(3000, 1.0, 7), n_splits=20).mean()
    assert 0.42 < accuracy < 0.58


def test_clipping_takes_infinite_losses_and_without_it_they_are_refused():
    infinite, large = MEMBERS.clone(), MEMBERS.clone()
    infinite[:4], large[:4] = math.inf, 100.0
    clipped = logistic_attack(infinite, NONMEMBERS, clip=100.0)
    assert clipped.tolist() == logistic_attack(large, NONMEMBERS).tolist()
    with pytest.raises(ValueError, match="`member_losses` to be finite, but got '4 samples"):
        logistic_attack(infinite, NONMEMBERS)


@pytest.mark.parametrize("columns", [None, 4])
def test_support_vector_attack_is_scikit_learns_classifier(columns):
    forget, retain, test = (
        drawn(count, scale, seed, columns) for count, scale, seed in ((200, 1.5, 2), (90, 1.0, 3), (90, 2.5, 4))
    )
    width = columns or 1
    features = torch.cat([retain, test]).numpy().reshape(-1, width)
    classifier = SVC(C=3, gamma=1 / width, kernel="rbf").fit(features, [True] * 90 + [False] * 90)
    shares = support_vector_attack(forget=forget, retain=retain, test=test)
    oracle = [classifier.predict(part.numpy().reshape(-1, width)).mean() for part in (forget, retain, test)]
    assert [shares.forget, shares.retain, shares.test] == pytest.approx(oracle, abs=1e-12)
    assert shares.efficacy == pytest.approx((~classifier.predict(forget.numpy().reshape(-1, width))).mean())
    assert shares.test + 0.1 < shares.forget < shares.retain


def test_support_vector_attack_samples_the_larger_set():
    many = torch.from_numpy(np.sort(drawn(400, 1.0, 8).numpy()))
    kept = torch.from_numpy(np.random.default_rng(5).choice(many.numpy(), 90, replace=False))
    sampled = support_vector_attack(forget=FORGET, retain=many, test=TEST, seed=5)
    assert sampled == support_vector_attack(forget=FORGET, retain=kept, test=TEST)
    assert sampled != support_vector_attack(forget=FORGET, retain=many, test=TEST, seed=6)
    # Unbalanced, the classifier leans to the larger set.
    features = torch.cat([many, TEST]).numpy().reshape(-1, 1)
    unbalanced = SVC(C=3, gamma="auto").fit(features, [1] * 400 + [0] * 90).predict(FORGET.numpy().reshape(-1, 1))
    assert unbalanced.mean() > sampled.forget + 0.1


def two_class_softmax(retain, test):
    """Multinomial regression over two classes, each with weights and penalty of its own; larger = more like retain."""
    values = np.r_[retain, test]
    labels = np.r_[np.ones(len(retain), dtype=int), np.zeros(len(test), dtype=int)]
    share = np.where(labels == 1, len(values) / (2 * len(retain)), len(values) / (2 * len(test)))

    def objective(parameters):
        logits = np.outer(values, parameters[:2]) + parameters[2:]
        return (
            -(share * log_softmax(logits, axis=1)[range(len(values)), labels]).sum() + (parameters[:2] ** 2).sum() / 2
        )

    fitted = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    return lambda entropies: (entropies * (fitted[1] - fitted[0]) + fitted[3] - fitted[2] > 0).mean()


def test_entropy_attack_is_multinomial_regression_with_balanced_weights():
    retain, test = torch.linspace(0, 0.6, 40).double() ** 3, torch.linspace(0.1, 1.5, 12).double()
    forget = torch.linspace(0, 1.5, 4001).double()
    shares = entropy_attack(forget=forget, retain=retain, test=test)
    oracle = two_class_softmax(retain.numpy(), test.numpy())
    assert shares.forget == pytest.approx(oracle(forget.numpy()), abs=1.5 / 4001)
    assert (shares.retain, shares.test) == (oracle(retain.numpy()), oracle(test.numpy()))
    # The penalty matters on this many samples, and so do the weights: other forms are told apart.
    features, labels = torch.cat([retain, test]).numpy().reshape(-1, 1), [1] * 40 + [0] * 12
    for options in ({"class_weight": "balanced"}, {"C": 2.0}):
        other = LogisticRegression(**options).fit(features, labels).predict(forget.numpy().reshape(-1, 1)).mean()
        assert abs(other - shares.forget) > 0.01


def test_the_order_of_samples_does_not_matter():
    many, four = drawn(500, 1.0, 9), drawn(120, 1.0, 10, columns=4)
    shuffle = torch.Generator().manual_seed(0)

    def mixed(values):
        return values[torch.randperm(len(values), generator=shuffle)]

    assert torch.equal(logistic_attack(many, NONMEMBERS), logistic_attack(mixed(many), mixed(NONMEMBERS)))
    parts = {"forget": FORGET, "retain": many, "test": TEST}
    wide = dict(zip(parts, four.split([30, 70, 20]), strict=True))
    for attack, given in ((support_vector_attack, parts), (entropy_attack, parts), (support_vector_attack, wide)):
        assert attack(**given) == attack(**{name: mixed(part) for name, part in given.items()})


def test_float32_samples_are_fitted_in_float64():
    floats = {name: part.float() for name, part in PARTS.items()}
    doubles = {name: part.double() for name, part in floats.items()}
    assert support_vector_attack(**floats) == support_vector_attack(**doubles)
    assert entropy_attack(**floats) == entropy_attack(**doubles)
    pairs = ((parts["forget"], parts["test"]) for parts in (floats, doubles))
    assert torch.equal(*(logistic_attack(*pair) for pair in pairs))


def test_efficacy_is_the_rest_of_the_forget_set():
    assert MemberShares(forget=0.3, retain=0.9, test=0.2).efficacy == 0.7


@pytest.mark.parametrize(
    ("attack", "arguments", "options", "match"),
    [
        (logistic_attack, (MEMBERS[:9], NONMEMBERS), {}, "`member_losses` to be of shape .* at least 10"),
        (logistic_attack, (MEMBERS, NONMEMBERS[:9]), {}, "`nonmember_losses`"),
        (logistic_attack, (MEMBERS * math.nan, NONMEMBERS), {"clip": 1.0}, "`member_losses` to be finite"),
        (logistic_attack, (MEMBERS, NONMEMBERS), {"n_splits": 0}, "n_splits"),
        (logistic_attack, (MEMBERS, NONMEMBERS), {"clip": -1.0}, "clip"),
        (logistic_attack, (MEMBERS, NONMEMBERS), {"seed": -1}, "seed"),
        (support_vector_attack, (), PARTS | {"forget": FORGET[:0]}, "`forget` to be .* at least 1"),
        (support_vector_attack, (), PARTS | {"retain": RETAIN[:9]}, "`retain` to be .* at least 10"),
        (support_vector_attack, (), PARTS | {"test": TEST[:9]}, "`test` to be"),
        (support_vector_attack, (), PARTS | {"test": TEST * math.inf}, "`test` to be finite"),
        (support_vector_attack, (), PARTS | {"forget": FORGET[:, None].repeat(1, 2)}, "equally many .*'forget': 2"),
        (support_vector_attack, (), PARTS | {"seed": -1}, "seed"),
        (entropy_attack, (), PARTS | {"retain": RETAIN[:9]}, "`retain` to be"),
        (entropy_attack, (), PARTS | {"test": TEST[:, None]}, "`test` to be a vector"),
    ],
)
def test_refuses_by_name(attack, arguments, options, match):
    with pytest.raises(ValueError, match=match):
        attack(*arguments, **options)


@pytest.fixture(scope="module")
def seen_and_not():
    """Outputs by split of a network trained on all 600 samples, and of one that never saw the 250 to forget."""
    images, labels, order = noisy_digits()
    trained, test = order[:600], order[600:1200]
    splits = {"forget": trained[:250], "retain": trained[250:], "test": test}
    outputs = {}
    for name, rows in (("original", trained), ("retrained", splits["retain"])):
        net = overfitted(images[rows], labels[rows], seed=0)
        with torch.no_grad():
            outputs[name] = {split: (net(images[kept]), labels[kept]) for split, kept in splits.items()}
    return outputs


@pytest.mark.parametrize("score", ["loss", "confidence", "modified_entropy"])
def test_thresholds_tell_members_of_an_overfitted_model_and_not_of_a_retrained_one(seen_and_not, score):
    found = {
        name: threshold_attack(*(-membership_score(*outputs[split], score) for split in ("forget", "test")))
        for name, outputs in seen_and_not.items()
    }
    assert 0.7 < found["original"]["membership_auroc"] < 0.8
    assert 0.44 < found["retrained"]["membership_auroc"] < 0.56
    assert found["original"]["membership_accuracy"] > found["retrained"]["membership_accuracy"] + 0.1


def test_entropy_tells_less_since_it_does_not_know_the_label(seen_and_not):
    parts = (-membership_score(*seen_and_not["original"][split], "entropy") for split in ("forget", "test"))
    assert 0.54 < threshold_attack(*parts)["membership_auroc"] < 0.66


@pytest.mark.parametrize("form", [{"n_splits": 5, "clip": 100.0}, {}], ids=["scrub", "kit"])
def test_logistic_attack_tells_them_as_well(seen_and_not, form):
    accuracy = {
        name: logistic_attack(*(cross_entropy_per_sample(*outputs[split]) for split in ("forget", "test")), **form)
        for name, outputs in seen_and_not.items()
    }
    assert 0.68 < accuracy["original"].mean() < 0.82
    assert 0.42 < accuracy["retrained"].mean() < 0.58


@pytest.mark.parametrize("feature", ["correctness", "confidence", "modified_entropy"])
def test_forget_samples_pass_for_retain_before_and_for_held_out_ones_after(seen_and_not, feature):
    shares = {
        name: support_vector_attack(**{split: attack_features(*part, feature) for split, part in outputs.items()})
        for name, outputs in seen_and_not.items()
    }
    assert shares["original"].forget == pytest.approx(shares["original"].retain, abs=0.04)
    assert shares["original"].efficacy < 0.1
    assert shares["retrained"].forget == pytest.approx(shares["retrained"].test, abs=0.13)
    assert 0.5 < shares["retrained"].efficacy < 0.7


def test_entropy_attack_tells_them_weakly(seen_and_not):
    shares = {
        name: entropy_attack(**{split: prediction_entropy(logits) for split, (logits, _) in outputs.items()})
        for name, outputs in seen_and_not.items()
    }
    assert shares["original"].forget == pytest.approx(shares["original"].retain, abs=0.08)
    assert shares["retrained"].forget == pytest.approx(shares["retrained"].test, abs=0.08)
    assert shares["retrained"].forget + 0.15 < shares["retrained"].retain
