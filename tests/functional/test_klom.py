"""KLOM against NumPy's histogram and SciPy's entropy, and margins against probabilities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from lightning_unlearn.functional.klom import klom
from lightning_unlearn.functional.margins import margins


def groups(n=30, m=30, samples=7, shift=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(samples, generator=generator, dtype=torch.float64) * 3
    unlearned, retrained = (torch.randn(k, samples, generator=generator, dtype=torch.float64) for k in (n, m))
    return unlearned * scale + centre + shift, retrained + centre


def by_histogram(unlearned, retrained, bins=20, clip=100.0, eps=1e-5):
    """One sample after the other; the last bin of NumPy's histogram holds its upper edge."""
    values = []
    for p, q in zip(np.clip(unlearned.numpy(), -clip, clip).T, np.clip(retrained.numpy(), -clip, clip).T, strict=True):
        low, high = min(p.min(), q.min()), max(p.max(), q.max())
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
        p, q = (np.histogram(one, edges)[0] / len(one) for one in (p, q))
        values.append(entropy(p, np.where(p > 0, np.maximum(q, eps), q)))
    return np.array(values)


def by_digitize(unlearned, retrained):
    """What the published code does: the upper edge is in no bin."""
    values = []
    for p, q in zip(unlearned.numpy().T, retrained.numpy().T, strict=True):
        edges = np.linspace(min(p.min(), q.min()), max(p.max(), q.max()), 21)
        shares = []
        for one in (p, q):
            counts = np.array([np.sum(np.digitize(one, edges) == number) for number in range(1, 21)])
            shares.append(counts / counts.sum())
        values.append(entropy(shares[0], np.where(shares[0] > 0, np.maximum(shares[1], 1e-5), shares[1])))
    return np.array(values)


@pytest.mark.parametrize("options", [{}, {"shift": 2.0}, {"shift": -40.0}, {"scale": 9.0}, {"n": 12, "m": 45}])
def test_equals_numpy_and_scipy(options):
    pair = groups(**options)
    value = klom(*pair)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), by_histogram(*pair), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(klom(*pair, closed=False).numpy(), by_digitize(*pair), rtol=1e-12, atol=1e-13)
    half = klom(*pair, bins=7, clip=3.0, epsilon=0.01)
    np.testing.assert_allclose(half.numpy(), by_histogram(*pair, bins=7, clip=3.0, eps=0.01), rtol=1e-12, atol=1e-13)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    st.integers(1, 25),
)
def test_equals_numpy_on_ties_and_edges(first, second, bins):
    pair = tuple(torch.tensor(values, dtype=torch.float64).unsqueeze(1) for values in (first, second))
    np.testing.assert_allclose(klom(*pair, bins=bins).numpy(), by_histogram(*pair, bins=bins), rtol=1e-9, atol=1e-12)
    assert klom(pair[0], pair[0], bins=bins).item() < 1e-14


def test_is_low_for_one_distribution_and_high_for_two():
    same = klom(*groups(n=200, m=200, samples=20)).mean()
    shifted = klom(*groups(n=200, m=200, samples=20, shift=8.0)).mean()
    # Empty bins of the retrained group have a price, so the floor is not at 0.
    assert 0.02 < same < 0.25
    assert 9 < shifted < math.log(1e5)


def test_the_direction_is_unlearned_from_retrained():
    narrow, broad = torch.tensor([[0.0]] * 9 + [[0.1]]), torch.tensor([[0.0]] * 5 + [[10.0]] * 5)
    # Unlearned models within what retrained ones show cost little; going beyond it costs the floor.
    assert klom(narrow, broad).item() == pytest.approx(math.log(2), rel=1e-9)
    assert klom(broad, narrow).item() > 4


def test_the_published_code_leaves_the_largest_margin_out():
    unlearned, retrained = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0]])
    assert klom(unlearned, retrained).item() == pytest.approx(by_histogram(unlearned, retrained)[0])
    assert klom(unlearned, retrained).item() > 4
    assert klom(unlearned, retrained, closed=False).item() == by_digitize(unlearned, retrained)[0] == 0


def test_infinite_margins_are_clipped():
    infinite = torch.tensor([[math.inf], [-math.inf]])
    assert klom(infinite, torch.tensor([[100.0], [-100.0]])).item() == 0


@pytest.mark.parametrize(
    ("unlearned", "retrained", "options", "match"),
    [
        (torch.zeros(3), torch.zeros(3, 1), {}, r"`unlearned` to be of shape"),
        (torch.zeros(0, 2), torch.zeros(3, 2), {}, "at least 1 models"),
        (torch.zeros(3, 2), torch.zeros(3, 1), {}, "2 samples"),
        (torch.zeros(3, 1), torch.full((3, 1), math.nan), {}, "`retrained` to be margins without NaN"),
        (torch.zeros(3, 1), torch.zeros(3, 1), {"bins": 0}, "bins"),
        (torch.zeros(3, 1), torch.zeros(3, 1), {"epsilon": 0}, "epsilon"),
        (torch.zeros(3, 1), torch.zeros(3, 1), {"clip": -1}, "clip"),
    ],
)
def test_refuses(unlearned, retrained, options, match):
    with pytest.raises(ValueError, match=match):
        klom(unlearned, retrained, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_margins_are_the_log_odds_of_the_target(dtype):
    logits = (torch.randn(40, 5) * 3).to(dtype)
    targets = torch.arange(40) % 5
    p = softmax(logits.double().numpy(), axis=1)[np.arange(40), targets.numpy()]
    np.testing.assert_allclose(margins(logits, targets).numpy(), np.log(p) - np.log1p(-p), rtol=1e-7, atol=1e-9)
    # Probabilities of a sure sample have rounded to 1; its margin has not.
    assert margins(torch.tensor([[80.0, 0.0, -1.0]]), torch.tensor([0])).item() == pytest.approx(
        80 - math.log(1 + math.exp(-1)), rel=1e-12
    )


def test_margins_refuse_other_shapes():
    for logits, targets in (
        (torch.zeros(3, 1), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(2)),
        (torch.zeros(3), torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="logits and targets"):
            margins(logits, targets.long())
