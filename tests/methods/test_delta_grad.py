"""DeltaGrad: the twin where every gradient is computed, near it on a convex problem, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import (
    LightningUnlearnError,
    MissingDeltaError,
    MissingRequirementError,
    UnsupportedStrategyError,
)
from lightning_unlearn.functional.limited_memory import LimitedMemoryHessian
from lightning_unlearn.methods import DeltaGrad, Retrain, UnrolledInfluence
from lightning_unlearn.methods.trajectory import check_length
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.recorded import loaders, record
from tests.methods.trajectories import EPOCHS, Regressor, cosine, dataset, fit, flat, forget, loader, twin

pytestmark = pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning")
FORGET = [3, 11, 17]
STEPS = EPOCHS * 4
OPTIMIZERS = {
    "plain, decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.05, "lr": 0.02},
    "nesterov, schedule": {"momentum": 0.8, "nesterov": True, "lr": 0.02, "schedule": (cosine(STEPS), "step")},
}


@pytest.mark.parametrize("hidden", [0, 5], ids=["linear", "network"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_every_gradient_computed_it_is_the_twin(tmp_path, name, hidden):
    model = Regressor(hidden=hidden, **OPTIMIZERS[name])
    initial, store = fit(tmp_path / "s", model)
    # One recorded batch is left empty: the retraining has no such step.
    ids = sorted({*store.record(5).sample_ids, 0})
    expected = twin(initial, store, ids)
    found = forget(model, store, ids, DeltaGrad(period=1))
    # Its own way is computed in float64 from the recorded start.
    torch.testing.assert_close(flat(found), flat(expected), rtol=0, atol=1e-12)


def test_it_is_retraining_in_the_recorded_order(tmp_path):
    trained = record(tmp_path)  # BatchNorm, whose batch gradients are no means over samples
    settings = {"data": loaders(), "store": trained.url, "probe_samples": 0, "record": False, "batch_norm": "keep"}
    trainer = {"max_epochs": 3, "accelerator": "cpu"}
    twin_of = unlearn(trained.model, [3, 40], method=Retrain(order="recorded"), trainer=trainer, **settings).model
    found = unlearn(trained.model, [3, 40], method=DeltaGrad(period=1), **settings).model
    original = trained.model.net.parameters()
    pairs = zip(twin_of.net.parameters(), original, strict=True)
    apart = max(float((one - other).detach().abs().max()) for one, other in pairs)
    for one, other in zip(found.net.parameters(), twin_of.net.parameters(), strict=True):
        assert float((one - other).detach().abs().max()) < 1e-3 * apart


def errors_by_period(folder, periods, hidden=0, epochs=40, **settings):
    model = Regressor(hidden=hidden, **settings)
    initial, store = fit(folder, model, epochs=epochs, train=full_batch())
    x, y = dataset().tensors
    retrained = copy.deepcopy(initial)
    optimizer = retrained.configure_optimizers()
    kept = [row for row in range(len(x)) if row not in FORGET]
    for _ in range(store.n_steps):
        optimizer.zero_grad()
        retrained.loss(x[kept], y[kept]).backward()
        optimizer.step()
    found = {
        period: forget(model, store, FORGET, DeltaGrad(period=period, burn_in=4), data=full_batch())
        for period in periods
    }
    nothing = float((flat(model) - flat(retrained)).norm())
    return {period: float((flat(one) - flat(retrained)).norm()) for period, one in found.items()}, nothing


def full_batch():
    return torch.utils.data.DataLoader(dataset(), 24)


def test_on_a_strongly_convex_problem_the_error_is_small_and_falls_with_the_period(tmp_path):
    errors, nothing = errors_by_period(tmp_path / "s", (1, 2, 5, 10), weight_decay=0.05, momentum=0.5, lr=0.05)
    assert errors[1] < 1e-12
    assert errors[1] < errors[2] < errors[5] < errors[10] < 0.1 * nothing
    assert errors[5] < 0.02 * nothing


def test_the_steps_are_those_of_a_plain_loop(tmp_path):
    model = Regressor(weight_decay=0.05)
    initial, store = fit(tmp_path / "s", model, epochs=6)
    x, y = dataset().tensors
    method = DeltaGrad(period=4, burn_in=3, history=2)
    found = forget(model, store, FORGET, method)

    def gradient(at, ids):
        with torch.no_grad():
            nn.utils.vector_to_parameters(at, model_copy.parameters())
        loss = model_copy.loss(x[ids], y[ids])
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(model_copy.parameters()))])

    # The paper's rule, written out for SGD with weight decay: gradients of the recorded run are computed anew here.
    model_copy, lr, decay = copy.deepcopy(initial), 0.05, 0.05
    recorded = flat(initial)
    mine, hessian, first, trusted, guessed = recorded.clone(), LimitedMemoryHessian(2), None, False, 0
    for step in range(store.n_steps):
        ids = list(store.record(step).sample_ids)
        kept, gone = [one for one in ids if one not in FORGET], [one for one in ids if one in FORGET]
        known = gradient(recorded, ids)
        first = step if first is None and gone else first
        if first is None:
            used = known
        elif step - first < 3 or (step - first - 3) % 4 == 0 or not trusted:
            away, used = mine - recorded, gradient(mine, kept)
            if away.any():
                trusted = hessian.add(away, gradient(mine, ids) - known)
        else:
            guessed += 1
            whole = known + hessian.times(mine - recorded)
            used = whole
            if gone:
                used = (len(ids) * whole - sum(gradient(mine, [one]) for one in gone)) / len(kept)
        mine = mine - lr * (used + decay * mine)
        recorded = recorded - lr * (known + decay * recorded)
    assert guessed > 8
    torch.testing.assert_close(recorded, flat(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(flat(found), mine, rtol=0, atol=1e-6)  # recorded gradients are known to float32


def test_steps_between_cost_the_forgotten_samples_alone(tmp_path, monkeypatch):
    model = Regressor(weight_decay=0.05)
    _, store = fit(tmp_path / "s", model, epochs=10, train=full_batch())
    seen = []
    original = Regressor.training_step

    def counting(self, batch, batch_idx):
        seen.append(len(batch[0]))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Regressor, "training_step", counting)
    forget(model, store, FORGET, DeltaGrad(period=3, burn_in=1, tolerance=None), data=full_batch())
    # Computed steps: 0, 1, 4, 7 with what is left and the whole batch; the others with three samples. In step 0 the
    # forgotten ones as well, to see whether gradients are means.
    assert sorted(seen) == sorted([3] * 6 + [21, 24] * 4 + [3])
    seen.clear()
    forget(model, store, FORGET, DeltaGrad(period=3, burn_in=1), data=full_batch())
    assert len(seen) == 15 + 3  # and three checks


def test_where_curvature_is_negative_or_too_large_gradients_are_computed(tmp_path, monkeypatch):
    class Concave(Regressor):
        """Its loss has a maximum: no pair shows positive curvature."""

        def loss(self, x, y, weights=None):
            return -0.01 * super().loss(x, y, weights)

    model = Concave()
    initial, store = fit(tmp_path / "s", model)
    expected = flat(twin(initial, store, FORGET))
    found = forget(model, store, FORGET, DeltaGrad(period=5, burn_in=0))
    torch.testing.assert_close(flat(found), expected, rtol=0, atol=1e-12)
    model = Regressor()
    initial, store = fit(tmp_path / "t", model)
    expected = flat(twin(initial, store, FORGET))
    bounded = flat(forget(model, store, FORGET, DeltaGrad(period=5, burn_in=0, max_curvature=1e-6)))
    torch.testing.assert_close(bounded, expected, rtol=0, atol=1e-12)
    free = flat(forget(model, store, FORGET, DeltaGrad(period=5, burn_in=0)))
    assert float((free - expected).norm()) > 1e-6


def test_gradients_that_are_no_means_are_computed_in_touched_steps(tmp_path):
    class Summed(Regressor):
        def loss(self, x, y, weights=None):
            return len(x) * super().loss(x, y, weights)

    model = Summed(lr=0.005)
    initial, store = fit(tmp_path / "s", model, epochs=10)
    expected, nothing = flat(twin(initial, store, FORGET)), flat(model)
    found = flat(forget(model, store, FORGET, DeltaGrad(period=2, burn_in=4)))
    assert float((found - expected).norm()) < 0.3 * float((nothing - expected).norm())


def test_only_whole_deltas_will_do(tmp_path):
    model = Regressor()
    _, store = fit(tmp_path / "pruned", model, keep=0.5)
    with pytest.raises(MissingRequirementError, match=r"keep=1\.0"):
        forget(model, store, FORGET, DeltaGrad())
    model = Regressor()
    _, store = fit(tmp_path / "watched", model, watch=[3])
    with pytest.raises(MissingDeltaError, match="whole delta of every step"):
        forget(model, store, [3], DeltaGrad())
    # What computes the weights where it has to does not mind.
    assert not torch.equal(flat(forget(model, store, [3], UnrolledInfluence())), flat(model))


def test_adam_does_not_tell_its_gradients(tmp_path):
    model = Regressor(optimizer=torch.optim.Adam)
    _, store = fit(tmp_path / "s", model)
    with pytest.raises(UnsupportedStrategyError, match="tell their gradients"):
        forget(model, store, FORGET, DeltaGrad())


def test_clipped_gradients_are_found(tmp_path):
    model = Regressor(lr=0.01)
    _, store = fit(tmp_path / "s", model, trainer={"gradient_clip_val": 0.05})
    with pytest.raises(ValueError, match="Clipped gradients"):
        forget(model, store, FORGET, DeltaGrad())


def test_16_bit_deltas_serve_as_well(tmp_path):
    model = Regressor(momentum=0.9, lr=0.02)
    initial, store = fit(tmp_path / "s", model, value_dtype="scaled_float16")
    assert DeltaStore.open(store.url).settings.value_dtype == "scaled_float16"
    expected = flat(twin(initial, store, FORGET))
    found = flat(forget(model, store, FORGET, DeltaGrad(period=3, burn_in=3)))
    assert float((found - expected).norm()) < 0.3 * float((flat(model) - expected).norm())


def test_arguments():
    wrong = {"period": 0, "burn_in": -1, "history": 0, "max_curvature": 0.0, "max_change": 0.0, "tolerance": -1.0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            DeltaGrad(**{name: value})
    assert loader().batch_size == 6


def test_a_way_longer_than_the_training_is_refused(tmp_path):
    with pytest.raises(LightningUnlearnError, match="2 times as long"):
        check_length("DeltaGrad", torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]), 1.0)
    with pytest.raises(LightningUnlearnError, match="inf times"):
        check_length("DeltaGrad", torch.ones(2), torch.zeros(2), 1.0)
    check_length("DeltaGrad", torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0]), 2.0)
    check_length("DeltaGrad", torch.ones(2), torch.zeros(2), None)
    model = Regressor()
    _, store = fit(tmp_path / "s", model)
    for method in (DeltaGrad(max_change=1e-6), UnrolledInfluence(max_change=1e-6)):
        with pytest.raises(LightningUnlearnError, match=f"training's own .* for {method.name}"):
            forget(model, store, FORGET, method)
