"""Planes against the published construction, balls against their volume, changes against known half-spaces."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pdist

from lightning_unlearn.functional.decision_regions import (
    BallSampling,
    PlaneSampling,
    labels_changed,
    plane_grid,
    region_points,
)


def triple(shape=(3, 4, 4), seed=0, dtype=torch.float64):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def published_plane(images, resolution, margin):
    """Written out from the description of dbViz, with numpy and a loop over grid points."""
    first, second, third = (image.double().flatten().numpy() for image in images)
    a = (second - first) / np.linalg.norm(second - first)
    b = third - first
    b_perp = b - (a @ b) * a
    b_perp /= np.linalg.norm(b_perp)
    corners = np.array([[0, 0], [np.linalg.norm(second - first), 0], [b @ a, b @ b_perp]])
    low, high = corners.min(0), corners.max(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    xs, ys = (np.linspace(low[axis], high[axis], resolution) for axis in (0, 1))
    return np.array([first + x * a + y * b_perp for x in xs for y in ys])


@given(st.integers(0, 1000), st.integers(2, 6), st.floats(0, 0.5))
def test_equal_the_published_construction(seed, resolution, margin):
    images = triple(seed=seed)
    points, coordinates = plane_grid(*images, resolution=resolution, margin=margin)
    assert points.shape == (resolution**2, 3, 4, 4)
    assert coordinates.shape == (resolution**2, 2)
    np.testing.assert_allclose(points.flatten(1).numpy(), published_plane(images, resolution, margin), atol=1e-12)


def test_coordinates_are_distances_in_input_space():
    images = triple()
    points, coordinates = plane_grid(*images, resolution=7)
    torch.testing.assert_close((points - images[0]).flatten(1).norm(dim=1), coordinates.norm(dim=1))
    torch.testing.assert_close(pdist(points.flatten(1)), pdist(coordinates))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_margin_the_samples_are_on_the_border_of_the_grid(dtype):
    first, second = torch.zeros(3, dtype=dtype), torch.tensor([4.0, 0.0, 0.0], dtype=dtype)
    third = torch.tensor([2.0, 2.0, 0.0], dtype=dtype)
    points, _ = plane_grid(first, second, third, resolution=3, margin=0.0)
    assert points.dtype == dtype
    for sample in (first, second, third):
        assert (points == sample).all(dim=1).any()


@pytest.mark.parametrize("resolution", [3, 4, 21])
def test_a_disc_holds_the_points_of_the_square_within_the_radius(resolution):
    images = triple()
    points, coordinates = plane_grid(*images, resolution=resolution, radius=0.5)
    ticks = np.linspace(-0.5, 0.5, resolution)
    assert len(points) == sum(math.hypot(x, y) <= 0.5 for x in ticks for y in ticks)
    assert 0 < (points - images[0]).flatten(1).norm(dim=1).max() <= 0.5 + 1e-12
    torch.testing.assert_close(coordinates.mean(0), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("samples", "settings", "match"),
    [
        ((torch.zeros(2), torch.ones(2), torch.full((2,), 0.3)), {}, "span a plane"),
        ((torch.zeros(2), torch.zeros(2), torch.ones(2)), {}, "span a plane"),
        ((torch.zeros(2), torch.ones(2), torch.zeros(2)), {}, "span a plane"),
        ((torch.zeros(2), torch.ones(2), torch.zeros(3)), {}, "one shape"),
        ((torch.zeros(2).byte(),) * 3, {}, "floating"),
        (torch.eye(3), {"resolution": 1}, "resolution"),
        (torch.eye(3), {"resolution": 2, "radius": 1.0}, "at least 3"),
        (torch.eye(3), {"radius": 0.0}, "radius"),
        (torch.eye(3), {"margin": -0.1}, "margin"),
    ],
)
def test_refuses_what_is_no_plane(samples, settings, match):
    with pytest.raises(ValueError, match=match):
        plane_grid(*samples, **{"resolution": 5, **settings})


def test_points_of_a_ball_are_uniform_in_its_volume():
    anchor = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    points = BallSampling(radius=2.0, points=20_000)(anchor, None, torch.Generator().manual_seed(1))
    shares = (points - anchor).norm(dim=1) / 2
    assert shares.max() <= 1
    for share in (0.3, 0.6, 0.9):
        # The share of a ball's volume within a part of its radius, within five standard errors.
        assert (shares <= share).double().mean().item() == pytest.approx(share**3, abs=5 * 0.5 / math.sqrt(20_000))
    assert (points - anchor).mean(0).abs().max() < 0.05


def test_a_half_space_that_turned_changed_where_both_disagree():
    """Two linear classifiers with normals 60 degrees apart disagree in a third of every disc around the corner."""
    normals = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in (0.1, 0.1 + math.pi / 3)]).double()
    points, _ = plane_grid(torch.zeros(2).double(), *torch.eye(2).double(), resolution=301, radius=1.0)
    before, after = ((points @ normal > 0).long() for normal in normals)
    assert labels_changed(before, after).double().mean().item() == pytest.approx(1 / 3, abs=0.01)
    logits = torch.stack([-points @ normals[1], points @ normals[1]], dim=1)
    assert torch.equal(labels_changed(before, logits), before != after)
    assert not labels_changed(after, after).any()


def test_refuses_answers_at_other_points():
    with pytest.raises(ValueError, match="for 3 points, but got 4"):
        labels_changed(torch.zeros(3).long(), torch.zeros(4, 2))


@pytest.mark.parametrize("sampling", [PlaneSampling(planes=2, resolution=4), BallSampling(radius=0.5, points=9)])
def test_anchors_are_drawn_for_independently_of_each_other_and_of_the_global_generator(sampling):
    anchors, others = torch.randn(3, 2, 4), torch.randn(6, 2, 4)
    state = torch.get_rng_state()
    parts = list(region_points(anchors, others, sampling=sampling, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    again = list(region_points(anchors[:2], others, sampling=sampling, seed=3))
    assert len(parts) == 3
    assert all(torch.equal(left, right) for left, right in zip(parts, again, strict=False))
    assert not torch.equal(parts[0] - anchors[0], parts[1] - anchors[1])
    other_seed = list(region_points(anchors, others, sampling=sampling, seed=4))
    assert not torch.equal(parts[0], other_seed[0])


def test_the_default_leaves_the_range_of_inputs_and_a_clamp_does_not():
    anchors, others = torch.rand(2, 3), torch.rand(5, 3)
    sampling = PlaneSampling(resolution=5, margin=0.5)
    free = torch.cat(list(region_points(anchors, others, sampling=sampling)))
    held = torch.cat(list(region_points(anchors, others, sampling=sampling, clamp=(0.0, 1.0))))
    assert free.min() < 0
    assert torch.equal(held, free.clamp(0, 1))


def test_an_anchor_among_the_others_is_not_drawn_for_itself():
    others = torch.randn(3, 4)
    sampling = PlaneSampling(resolution=3, radius=1.0)
    for seed in range(10):
        parts = region_points(others, torch.cat([others, others]), sampling=sampling, seed=seed)
        for points, anchor in zip(parts, others, strict=True):
            assert (points == anchor).all(dim=1).any(), "the middle of the disc is the anchor"
    with pytest.raises(ValueError, match="two differ from the anchor and from each other"):
        next(region_points(others[:1], others[:2], sampling=PlaneSampling()))


@pytest.mark.parametrize(
    ("sampling", "match"),
    [
        (PlaneSampling(planes=0), "planes"),
        (BallSampling(radius=-1.0), "radius"),
        (BallSampling(1.0, points=0), "points"),
    ],
)
def test_refuses_settings_out_of_range(sampling, match):
    with pytest.raises(ValueError, match=match):
        next(region_points(torch.zeros(1, 3), torch.eye(3), sampling=sampling))
