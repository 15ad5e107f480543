"""The Newton step against dense matrices, and against retraining where that is a point."""

import copy

import pytest
import torch
from torch.nn import functional

from lightning_unlearn.exceptions import LightningUnlearnError, MissingRequirementError
from lightning_unlearn.methods import InfluenceUnlearning
from tests.methods.edits import (
    CLASSES,
    FEATURES,
    FORGET,
    ROWS,
    Softmax,
    dense_hessian,
    edit_of,
    flat,
    kept,
    minimised,
    rows,
    sample_gradients,
    split,
)


def difference(module):
    """v by its definition, sample by sample."""
    n_f, n_r = len(FORGET), ROWS - len(FORGET)
    forget, retain = sample_gradients(module, FORGET).sum(0), sample_gradients(module, kept()).sum(0)
    return forget / ROWS - n_f / (ROWS * n_r) * retain


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_with_the_hessian_it_is_the_inverse_times_v(batch_size, alpha):
    module = Softmax(penalty=0.1)
    method = InfluenceUnlearning(alpha=alpha, curvature="hessian", damping=0.05, tolerance=1e-12)
    change = edit_of(method, module, split(batch_size))
    wanted = torch.linalg.solve(damped(dense_hessian(module, kept()), 0.05), difference(module))
    torch.testing.assert_close(flat(change), alpha * wanted, rtol=1e-8, atol=1e-10)
    assert list(change) == ["net.0.weight", "net.0.bias"]


def test_with_the_fisher_it_is_the_inverse_of_the_gauss_newton_part():
    module = Softmax(hidden=3)
    change = edit_of(InfluenceUnlearning(damping=0.05, tolerance=1e-12, max_iterations=200), module)
    x, _ = rows(kept())
    parameters = list(module.net.parameters())
    matrix = torch.zeros(flat(change).numel(), flat(change).numel(), dtype=torch.float64)
    for row in x:
        z = module(row[None])[0]
        jacobian = torch.stack(
            [
                torch.cat([one.flatten() for one in torch.autograd.grad(entry, parameters, retain_graph=True)])
                for entry in z
            ]
        )
        p = z.detach().softmax(0)
        matrix += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(x)
    wanted = torch.linalg.solve(damped(matrix, 0.05), difference(module))
    torch.testing.assert_close(flat(change), wanted, rtol=1e-7, atol=1e-9)
    hessian = torch.linalg.solve(damped(dense_hessian(module, kept()), 0.05), difference(module))
    assert not torch.allclose(flat(change), hessian, rtol=1e-2)


@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_woodfisher_is_the_inverse_of_the_empirical_fisher(damping):
    module = Softmax(hidden=3)
    change = edit_of(InfluenceUnlearning(solver="woodfisher", damping=damping), module)
    gradients = sample_gradients(module, kept())
    matrix = damped(gradients.T @ gradients / len(gradients), damping)
    v = difference(module)
    torch.testing.assert_close(flat(change), torch.linalg.solve(matrix, v), rtol=1e-7, atol=1e-9)
    if damping == 0.01:
        # The published recursion leaves v but along the first sample's gradient; this one must not.
        first = functional.normalize(gradients[0], dim=0)
        moved = flat(change) * damping - v
        beside = moved - (moved @ first) * first
        assert float(beside.norm()) > 0.3 * float(moved.norm())


def test_a_draw_of_samples_is_one_of_the_retain_data_and_follows_the_seed():
    module = Softmax(hidden=3)
    v, gradients = difference(module), sample_gradients(module, kept())
    found = []
    for seed in (0, 1):
        method = InfluenceUnlearning(solver="woodfisher", damping=0.1, max_samples=6, seed=seed)
        change = flat(edit_of(method, module))
        torch.testing.assert_close(change, flat(edit_of(method, module)), rtol=0, atol=0)
        order = torch.randperm(len(gradients), generator=torch.Generator().manual_seed(seed))[:6].sort().values
        chosen = gradients[order]
        wanted = torch.linalg.solve(damped(chosen.T @ chosen / 6, 0.1), v)
        torch.testing.assert_close(change, wanted, rtol=1e-7, atol=1e-9)
        found.append(change)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)


class Counting(Softmax):
    """Counts how often its loss is taken."""

    taken = 0

    def training_step(self, batch, batch_idx):
        self.taken += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("max_samples", [None, 10])
def test_more_memory_than_allowed_is_refused_before_anything_is_computed(max_samples):
    module = Counting()
    weights = FEATURES * CLASSES + CLASSES  # the frozen ones have no entry
    needed = 8 * weights * (max_samples or ROWS - len(FORGET))
    settings = {"solver": "woodfisher", "max_samples": max_samples}
    with pytest.raises(
        ValueError, match=rf"`max_samples`.*at most {needed // (8 * weights) - 1}.*memory_bytes={needed}"
    ):
        edit_of(InfluenceUnlearning(memory_bytes=needed - 1, **settings), module)
    assert module.taken == 0
    exact = edit_of(InfluenceUnlearning(memory_bytes=needed, **settings), module)
    unbounded = edit_of(InfluenceUnlearning(memory_bytes=None, **settings), module)
    torch.testing.assert_close(flat(exact), flat(unbounded), rtol=0, atol=0)
    edit_of(InfluenceUnlearning(memory_bytes=1), module)  # conjugate gradients keep no vector for a sample


def test_at_the_minimum_of_a_convex_loss_one_step_is_almost_retraining():
    trained = minimised(Softmax(penalty=0.3), range(ROWS))
    retrained = minimised(copy.deepcopy(trained), kept())
    method = InfluenceUnlearning(curvature="hessian", damping=1e-9, tolerance=1e-12, max_iterations=200)
    change = edit_of(method, trained)
    wanted = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(retrained.net.parameters(), trained.net.parameters(), strict=True)]
    )
    # Half a step, a step of the other sign, or v alone are all an order of magnitude further away.
    assert float((flat(change) - wanted).norm()) < 0.08 * float(wanted.norm())
    assert float((difference(trained) - wanted).norm()) > 0.3 * float(wanted.norm())


def test_negative_curvature_is_refused():
    class Concave(Softmax):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)

    with pytest.raises(LightningUnlearnError, match="damping"):
        edit_of(InfluenceUnlearning(curvature="hessian", damping=1e-6), Concave(penalty=0.1))


def test_targets_that_are_no_answers_need_the_hessian():
    class Regression(Softmax):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1]).square().mean()

    x, _ = rows()
    values = torch.utils.data.TensorDataset(x, 3 * x[:, :3])
    data = type(split())(torch.utils.data.DataLoader(values, 8), FORGET)
    with pytest.raises(MissingRequirementError, match="hessian"):
        edit_of(InfluenceUnlearning(), Regression(), data)
    change = flat(edit_of(InfluenceUnlearning(curvature="hessian", damping=1e-3), Regression(), data))
    assert torch.isfinite(change).all()
    assert float(change.norm()) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0},
        {"solver": "lu"},
        {"curvature": "none"},
        {"damping": 0.0},
        {"max_iterations": 0},
        {"max_samples": 0},
        {"memory_bytes": 0},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        InfluenceUnlearning(**settings)
