"""Estimates against written-out formulas."""

import math

import numpy as np
import pytest
import torch

from lightning_unlearn.functional.membership import cross_entropy_per_sample
from lightning_unlearn.procedures.evidence import gather_evidence, mean_estimate, share_estimate
from lightning_unlearn.procedures.outputs import ModelOutputs


def outputs(confidence, count, seed=0):
    """A two-class model that gives class 0 about this probability; the target is class 0 throughout."""
    generator = torch.Generator().manual_seed(seed)
    logit = math.log(confidence / (1 - confidence)) + 0.3 * torch.randn(count, generator=generator)
    logits = torch.stack([logit, torch.zeros(count)], dim=1)
    targets = torch.zeros(count, dtype=torch.long)
    return ModelOutputs(logits, targets, cross_entropy_per_sample(logits, targets))


def models(**confidences):
    """Role -> (forget, test) confidence."""
    return {
        role: {"forget": outputs(forget, 20, seed), "test": outputs(test, 300, seed + 50)}
        for seed, (role, (forget, test)) in enumerate(confidences.items())
    }


def test_mean_and_standard_error_equal_numpy():
    values = torch.randn(33, generator=torch.Generator().manual_seed(0)).double().numpy()
    estimate = mean_estimate(torch.from_numpy(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(values.std(ddof=1) / np.sqrt(33))
    assert mean_estimate(torch.tensor([2.0])).error == 0
    assert mean_estimate(torch.tensor([True, False])).value == 0.5


def test_a_share_has_a_standard_error_even_where_all_are_alike():
    assert share_estimate(torch.ones(20)).value == 1
    assert 0.03 < share_estimate(torch.ones(20)).error < 0.08
    many = (torch.arange(4000) % 5 == 0).double()
    assert share_estimate(many).error == pytest.approx(mean_estimate(many).error, rel=1e-2)


def test_retrained_reference_is_paired_and_takes_noise_from_the_test_shift():
    found = models(original=(0.9, 0.8), unlearned=(0.4, 0.8), retrained=(0.3, 0.75))
    evidence = gather_evidence(found)
    o, u, g = (found[role]["forget"].confidences.numpy() for role in ("original", "unlearned", "retrained"))
    assert evidence.reference == "retrained"
    assert evidence.samples == 20
    assert evidence.original.value == pytest.approx((o - g).mean())
    shift = abs((found["original"]["test"].confidences - found["retrained"]["test"].confidences).mean().item())
    sampling = (o - g).std(ddof=1) / np.sqrt(20)
    assert evidence.original.error == pytest.approx(math.hypot(sampling, shift))
    assert evidence.moved.value == pytest.approx((o - u).mean())
    assert evidence.moved.error == pytest.approx((o - u).std(ddof=1) / np.sqrt(20))
    assert evidence.placebo is None
    assert evidence.advantage is None


def test_noise_is_measured_where_there_are_further_retrainings():
    found = models(original=(0.9, 0.8), unlearned=(0.4, 0.8), retrained=(0.3, 0.5))
    others = [outputs(0.35, 20, 7), outputs(0.2, 20, 8)]
    evidence = gather_evidence(found, others)
    means = [item.confidences.mean().item() for item in (found["retrained"]["forget"], *others)]
    difference = (found["original"]["forget"].confidences - found["retrained"]["forget"].confidences).numpy()
    expected = math.hypot(difference.std(ddof=1) / np.sqrt(20), np.std(means, ddof=1))
    assert evidence.original.error == pytest.approx(expected)


def test_held_out_samples_stand_in_for_a_retrained_model():
    found = models(original=(0.95, 0.7), unlearned=(0.7, 0.7), placebo=(0.9, 0.7))
    evidence = gather_evidence(found)
    forget, test = (found["original"][split].confidences.numpy() for split in ("forget", "test"))
    assert evidence.reference == "held-out"
    assert evidence.original.value == pytest.approx(forget.mean() - test.mean())
    assert evidence.original.error == pytest.approx(
        math.hypot(forget.std(ddof=1) / np.sqrt(20), test.std(ddof=1) / np.sqrt(300))
    )
    placebo, unlearned = (found[role]["forget"].confidences for role in ("placebo", "unlearned"))
    assert evidence.advantage.value == pytest.approx((placebo - unlearned).mean().item())


def test_for_wrong_labels_the_stand_in_is_what_wrong_classes_are_given():
    found = models(original=(0.8, 0.95), unlearned=(0.02, 0.95))
    blind = gather_evidence(found)
    assert blind.original.value < 0, "without knowledge of the labels nothing seems memorised"
    evidence = gather_evidence(found, altered=torch.ones(20, dtype=torch.bool))
    test = found["original"]["test"].confidences.mean().item()
    assert evidence.original.value == pytest.approx(found["original"]["forget"].confidences.mean().item() - (1 - test))
    assert evidence.unlearned.value == 0, "anything up to the bound is possible for a model that never saw them"
    half = gather_evidence(found, altered=torch.arange(20) < 10)
    seen = found["original"]["forget"].confidences.mean().item()
    assert half.original.value == pytest.approx(seen - (test / 2 + (1 - test) / 2))
    unlearned = found["unlearned"]
    least = unlearned["test"].confidences.mean().item() / 2
    assert half.unlearned.value == pytest.approx(unlearned["forget"].confidences.mean().item() - least)


def test_damage_is_what_is_lost_beyond_the_retrained_model():
    good, bad = (0.9, 0.9), (0.9, 0.4)
    assert gather_evidence(models(original=good, unlearned=bad)).damage.value > 0.6
    assert abs(gather_evidence(models(original=good, unlearned=bad, retrained=bad)).damage.value) < 0.2
    assert gather_evidence(models(original=bad, unlearned=bad, retrained=good)).damage.value < 0.2
