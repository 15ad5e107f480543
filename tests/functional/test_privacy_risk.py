"""The privacy risk score against written-out loops, exact decimals, and models that did and did not see the samples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.functional.prediction_scores import modified_entropy
from lightning_unlearn.functional.privacy_risk import privacy_risk_score
from tests.helpers.overfitted import noisy_digits, overfitted


def risk_oracle(
    scores, labels, member_scores, member_labels, nonmember_scores, nonmember_labels, n_bins, log_bins, floor
):
    """One sample after the other, one bin after the other."""
    result = []
    for score, label in zip(scores, labels, strict=True):
        members = [s for s, its in zip(member_scores, member_labels, strict=True) if its == label]
        nonmembers = [s for s, its in zip(nonmember_scores, nonmember_labels, strict=True) if its == label]
        if log_bins:
            score, members, nonmembers = max(score, floor), np.maximum(members, floor), np.maximum(nonmembers, floor)
        both = [*members, *nonmembers]
        spaced = np.geomspace if log_bins else np.linspace
        edges = spaced(min(both), max(both), n_bins + 1)

        def bin_of(value, edges=edges):
            for number in range(n_bins - 1):
                if value < edges[number + 1]:
                    return number
            return n_bins - 1

        inside, outside = np.zeros(n_bins), np.zeros(n_bins)
        for value in members:
            inside[bin_of(value)] += 1 / len(members)
        for value in nonmembers:
            outside[bin_of(value)] += 1 / len(nonmembers)
        here = bin_of(score)
        for distance in range(n_bins):
            found = [b for b in (here - distance, here + distance) if 0 <= b < n_bins and inside[b] + outside[b] > 0]
            if found:
                result.append(inside[found[0]] / (inside[found[0]] + outside[found[0]]))
                break
    return result


def samples(count, n_classes, generator, shift=0.0):
    """Scores over many orders of magnitude, with gaps, and class numbers that are not 0, 1, 2."""
    values = torch.exp(torch.randn(count, generator=generator, dtype=torch.float64) * 4 + shift)
    values[torch.rand(count, generator=generator) < 0.1] = 0
    return values, torch.randint(n_classes, (count,), generator=generator) * 3 + 1


@pytest.mark.parametrize("log_bins", [True, False])
@pytest.mark.parametrize("n_bins", [1, 2, 5, 40])
@pytest.mark.parametrize("floor", [1e-10, 0.1])
def test_score_is_the_written_out_loop(n_bins, log_bins, floor):
    generator = torch.Generator().manual_seed(n_bins)
    groups = [samples(200, 3, generator), samples(60, 3, generator, -1), samples(140, 3, generator, 1)]
    columns = [column for group in groups for column in group]
    value = privacy_risk_score(*columns, n_bins=n_bins, log_bins=log_bins, floor=floor)
    assert value.dtype == torch.float64
    wanted = risk_oracle(*(column.tolist() for column in columns), n_bins, log_bins, floor)
    assert value.numpy() == pytest.approx(np.array(wanted), abs=1e-12)


def long(*values):
    return torch.tensor(values)


def linear(scores, members, nonmembers, n_bins):
    """The score of one class on linear bins."""
    groups = [torch.tensor(values) for values in (scores, members, nonmembers)]
    columns = [column for values in groups for column in (values, torch.zeros(len(values), dtype=torch.long))]
    return privacy_risk_score(*columns, n_bins=n_bins, log_bins=False).tolist()


def test_shares_and_not_counts_are_compared():
    assert linear([0.0, 1.0], [0.0, 1.0], [0.0] * 300 + [1.0] * 300, n_bins=2) == [0.5, 0.5]


def test_empty_bins_take_the_nearest_and_of_two_the_left():
    # Bins of width 1 over [0, 6]: members in the first, non-members in the fourth, both in the last.
    members, nonmembers = [0.0, 6.0], [3.5, 3.5, 6.0]
    asked = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 4.0]
    third = 0.5 / (0.5 + 1 / 3)
    assert linear(asked, members, nonmembers, n_bins=6) == pytest.approx([1, 1, 0, 0, 0, third, 0])
    assert linear([2.5], [0.0, 0.0], [5.0], n_bins=5) == [1]


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_bins_span_the_range_of_the_shadow_scores_and_not_zero(shift):
    groups = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], [0.0, 1.0, 2.0, 6.0], [3.5, 3.5, 6.0]
    moved = [[value + shift for value in values] for values in groups]
    assert linear(*moved, n_bins=6) == linear(*groups, n_bins=6)


def test_samples_outside_the_range_get_the_end_bins():
    assert linear([-9.0, 99.0], [0.0, 0.0], [1.0, 1.0], n_bins=5) == [1, 0]


def test_an_inner_edge_belongs_to_the_bin_above():
    assert linear([1.0, 2.0], [0.0, 1.0], [2.0], n_bins=2) == linear([2.0, 2.0], [0.0, 1.0], [2.0], n_bins=2)


def test_one_value_everywhere_tells_nothing():
    assert linear([0.0, 3.0, 9.0], [3.0] * 4, [3.0], n_bins=5) == [0.5] * 3


def test_classes_have_histograms_of_their_own():
    columns = (
        (torch.tensor([1.0, 1.0]), long(0, 7)),
        (torch.tensor([1.0, 2.0]), long(0, 7)),
        (torch.tensor([2.0, 1.0]), long(0, 7)),
    )
    assert privacy_risk_score(*(column for group in columns for column in group)).tolist() == [1, 0]


def test_classes_of_shadow_samples_that_nobody_asks_for_do_not_matter():
    one, two = torch.tensor([1.0, 5.0]), torch.tensor([5.0])
    asked = privacy_risk_score(one, long(2, 2), one, long(2, 2), two, long(2))
    more = torch.tensor([1.0, 5.0, 900.0])
    assert torch.equal(
        asked, privacy_risk_score(one, long(2, 2), more, long(2, 2, 1), torch.tensor([5.0, 0.0]), long(2, 3))
    )


VALUES = st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 2)), max_size=25)


@st.composite
def three_groups(draw):
    """Target samples and two shadow sets, each with every class."""
    columns = []
    for _ in range(3):
        pairs = draw(VALUES) + [(draw(st.floats(0, 10)), label) for label in range(3)]
        columns += [torch.tensor([pair[0] for pair in pairs], dtype=torch.float64), long(*(pair[1] for pair in pairs))]
    return columns


@given(three_groups(), st.integers(1, 9), st.booleans())
@settings(max_examples=150, deadline=None)
def test_scores_are_probabilities_and_the_roles_can_be_exchanged(columns, n_bins, log_bins):
    scores = privacy_risk_score(*columns, n_bins=n_bins, log_bins=log_bins)
    assert ((scores >= 0) & (scores <= 1)).all()
    # In a filled bin as well: the bin that it is filled from does not depend on who is a member.
    exchanged = privacy_risk_score(*columns[:2], *columns[4:], *columns[2:4], n_bins=n_bins, log_bins=log_bins)
    torch.testing.assert_close(exchanged, 1 - scores)


@given(three_groups(), st.integers(1, 9), st.booleans())
@settings(max_examples=150, deadline=None)
def test_means_over_both_shadow_sets_sum_to_one_in_every_class(columns, n_bins, log_bins):
    shadows = columns[2:]
    scores = [
        privacy_risk_score(*asked, *shadows, n_bins=n_bins, log_bins=log_bins) for asked in (shadows[:2], shadows[2:])
    ]
    for label in range(3):
        means = [score[its == label].mean() for score, its in zip(scores, shadows[1::2], strict=True)]
        assert means[0] + means[1] == pytest.approx(1)
        assert means[0] >= 0.5 - 1e-12


@given(three_groups(), st.data())
@settings(max_examples=100, deadline=None)
def test_the_order_of_samples_does_not_matter(columns, data):
    orders = [torch.tensor(data.draw(st.permutations(range(len(column))))) for column in columns[::2]]
    shuffled = [column[orders[number // 2]] for number, column in enumerate(columns)]
    assert torch.equal(privacy_risk_score(*shuffled), privacy_risk_score(*columns)[orders[0]])


MAPS = {
    "factor": (lambda x: 7.3 * x, True),
    "power": (lambda x: x**0.37, True),
    "affine": (lambda x: 7.3 * x - 2, False),
}


@pytest.mark.parametrize(("change", "log_bins"), MAPS.values(), ids=MAPS)
def test_maps_that_keep_the_spacing_keep_the_score(change, log_bins):
    generator = torch.Generator().manual_seed(11)
    columns = [column for shift in (0, -1, 1) for column in samples(150, 2, generator, shift)]
    columns[::2] = [values + 1e-3 for values in columns[::2]]
    changed = [change(column) if number % 2 == 0 else column for number, column in enumerate(columns)]
    before, after = (privacy_risk_score(*each, log_bins=log_bins) for each in (columns, changed))
    torch.testing.assert_close(after, before)
    assert not torch.equal(before, privacy_risk_score(*columns, log_bins=not log_bins)), "any increasing map would do"


def test_equally_distributed_shadow_sets_give_about_one_half():
    generator = torch.Generator().manual_seed(3)
    columns = [column for count in (500, 4000, 2000) for column in samples(count, 2, generator)]
    scores = privacy_risk_score(*columns)
    assert scores.mean().item() == pytest.approx(0.5, abs=0.02)
    assert scores.std() < 0.06


ONE, ZERO = torch.ones(2), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.ones(0), "at least one score"),
        (torch.ones(2, 1), "at least one score"),
        (torch.tensor([1.0, math.nan]), "finite, but got '1 infinite or NaN'"),
        (torch.tensor([1.0, math.inf]), "finite, but got '1 infinite or NaN'"),
        (torch.tensor([1.0, -0.5]), "log_bins=False"),
    ],
)
def test_refuses_scores_by_name(position, bad, match):
    columns = [ONE, ZERO] * 3
    columns[position] = bad
    name = ("scores", "shadow_member_scores", "shadow_nonmember_scores")[position // 2]
    with pytest.raises(ValueError, match=f"^Expected `{name}` .*{match}"):
        privacy_risk_score(*columns)


@pytest.mark.parametrize("position", [1, 3, 5])
@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.long), torch.zeros(2), torch.zeros(2, dtype=torch.bool)])
def test_refuses_labels_by_name(position, bad):
    columns = [ONE, ZERO] * 3
    columns[position] = bad
    name = ("labels", "shadow_member_labels", "shadow_nonmember_labels")[position // 2]
    with pytest.raises(ValueError, match=f"^Expected `{name}` to be an integer vector of 2 class numbers"):
        privacy_risk_score(*columns)


@pytest.mark.parametrize(("position", "name"), [(3, "shadow_member_labels"), (5, "shadow_nonmember_labels")])
def test_refuses_a_class_that_a_shadow_set_lacks(position, name):
    columns = [ONE, long(3, 4)] * 3
    columns[position] = long(3, 3)
    with pytest.raises(ValueError, match=f"`{name}` to be labels of every class .* 'none of class 4'"):
        privacy_risk_score(*columns)


@pytest.mark.parametrize("options", [{"n_bins": 0}, {"n_bins": 2.0}, {"floor": 0}, {"floor": math.inf}])
def test_refuses_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        privacy_risk_score(*[ONE, ZERO] * 3, **options)


def test_members_of_an_overfitted_model_stand_out_and_those_of_a_retrained_one_do_not():
    images, labels, order = noisy_digits()
    trained, held_out, shadow_members, shadow_nonmembers = order.split(450)
    forget, retain = trained[:150], trained[150:]
    original, retrained, shadow = (
        overfitted(images[rows], labels[rows], seed) for seed, rows in enumerate((trained, retain, shadow_members))
    )

    def seen(net, rows):
        with torch.no_grad():
            return modified_entropy(net(images[rows]), labels[rows]), labels[rows]

    def risk(net, rows):
        shadows = (*seen(shadow, shadow_members), *seen(shadow, shadow_nonmembers))
        return privacy_risk_score(*seen(net, rows), *shadows).mean().item()

    assert 0.6 < risk(original, forget) < 0.85
    assert 0.15 < risk(original, held_out) < 0.4
    assert risk(retrained, forget) == pytest.approx(risk(retrained, held_out), abs=0.08)
    assert 0.15 < risk(retrained, forget) < 0.45, "below one half, since the shadow model tells its members"
