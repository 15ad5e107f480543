import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
from lightning_unlearn.exceptions import UnlearningWarning

SUBJECTS = st.lists(st.sampled_from([None, None, None, "a", "b", 7]), min_size=1, max_size=60)


@given(SUBJECTS, st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_properties(subjects, batch_size, replicas, drop_last, seed, epoch):
    def make(rank, **kwargs):
        sampler = SubjectGroupedBatchSampler(
            subjects, batch_size, max_share=1.0, drop_last=drop_last, seed=seed, num_replicas=replicas, rank=rank
        )
        sampler.set_epoch(epoch)
        return sampler

    ranks = [list(make(rank)) for rank in range(replicas)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(make(0))
    assert all(len({len(part) for part in parts}) == 1 for parts in zip(*ranks, strict=True))
    rows = Counter(row for batches in ranks for batch in batches for row in batch)
    padding = sum(rows.values()) - len(rows)
    if drop_last:
        assert padding == 0
        assert len(rows) == len(subjects) // (batch_size * replicas) * batch_size * replicas
    else:
        assert sorted(rows) == list(range(len(subjects)))
        assert padding < replicas
    assert [list(make(rank)) for rank in range(replicas)] == ranks


@given(st.lists(st.integers(1, 40), min_size=0, max_size=5), st.sampled_from([0.25, 0.5]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_subject_fills_the_fewest_batches_and_never_more_than_its_share(counts, max_share, epoch):
    # Rows enough for every chunk to have a batch of its own, so that the minimum can be reached.
    subjects = [subject for subject, count in enumerate(counts) for _ in range(count)] + [None] * 2000
    order = np.random.default_rng(0).permutation(len(subjects))
    subjects = [subjects[index] for index in order]
    sampler = SubjectGroupedBatchSampler(subjects, 16, max_share=max_share)
    sampler.set_epoch(epoch)
    cap = int(16 * max_share)
    held = [Counter(subjects[row] for row in batch if subjects[row] is not None) for batch in sampler]
    assert all(count <= cap for counter in held for count in counter.values())
    for subject, count in enumerate(counts):
        assert sum(subject in counter for counter in held) == -(-count // cap)


def test_the_global_batch_bounds_the_subject_and_ranks_share_it():
    subjects = ["s"] * 8 + [None] * 56
    ranks = [list(SubjectGroupedBatchSampler(subjects, 8, num_replicas=2, rank=rank)) for rank in range(2)]
    steps = [sum(row < 8 for part in parts for row in part) for parts in zip(*ranks, strict=True)]
    assert sorted(steps) == [0, 0, 0, 8]


def test_epochs_and_seeds_differ_and_the_rest_is_drawn_uniformly():
    subjects = ["s"] * 4 + [None] * 36
    sampler = SubjectGroupedBatchSampler(subjects, 8)
    companions, positions = Counter(), Counter()
    orders = set()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        orders.add(str(batches))
        (place,) = (index for index, batch in enumerate(batches) if 0 in batch)
        positions[place] += 1
        companions.update(row for row in batches[place] if row >= 4)
    assert len(orders) == 300
    assert str(list(SubjectGroupedBatchSampler(subjects, 8, seed=1))) not in orders
    # 300 draws with probability 1/9 and 1/5: standard deviations 5.4 and 6.9; five of them either way.
    assert len(companions) == 36
    assert all(abs(count - 300 * 4 / 36) < 28 for count in companions.values())
    assert all(abs(positions[place] - 60) < 35 for place in range(5))


def test_global_random_state_is_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(SubjectGroupedBatchSampler(["a", None, None], 2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_lightning_finds_set_epoch():
    from lightning.fabric.utilities.data import _set_sampler_epoch

    sampler = SubjectGroupedBatchSampler([None] * 8, 4)
    _set_sampler_epoch(torch.utils.data.DataLoader(range(8), batch_sampler=sampler), 3)
    assert sampler.epoch == 3


@pytest.mark.parametrize(("per_subject", "warns"), [(16, True), (64, True), (2, False)])
def test_one_class_batches_are_announced_once(per_subject, warns):
    subjects = [row // per_subject for row in range(640)]
    labels = [subject % 10 for subject in subjects]

    def make():
        sampler = SubjectGroupedBatchSampler(subjects, 64, max_share=1.0, labels=labels)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            list(sampler)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert [entry.category for entry in caught] == ([UnlearningWarning] if warns else [])


def test_mixed_subjects_are_not_announced():
    labels = np.random.default_rng(0).integers(0, 10, 640).tolist()
    SubjectGroupedBatchSampler([row // 16 for row in range(640)], 64, labels=labels)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_share": 0}, "max_share"),
        ({"max_share": 1.5}, "max_share"),
        ({"max_share": 0.1}, "at least 1 / 4"),
        ({"rank": 1}, "rank"),
        ({"labels": [0]}, "labels"),
        ({"seed": -1}, "seed"),
        ({"subjects": []}, "subjects"),
        ({"subjects": ["a"] * 6 + [None] * 2, "max_share": 0.5}, "a subject of 6 rows"),
    ],
)
def test_bad_arguments_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SubjectGroupedBatchSampler(**{"subjects": ["a", None, None, None], "batch_size": 4, **kwargs})
