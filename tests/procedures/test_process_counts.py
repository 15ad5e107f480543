"""What one number of processes recorded, another number forgets, edits and repairs, with the same weights."""

import warnings

import pytest
import torch
from lightning import seed_everything
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.methods import Amnesiac, FineTune, PartialAmnesiac
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import weights_digest
from tests.callbacks.sharded_training import DENSE, SAMPLES, Cut, strategy_of, train
from tests.helpers.models import IdDataset

IDS = [2, 5, 9, 17]  # which leaves an even number, so that two processes share them without repeating one
METHODS = {"Amnesiac": Amnesiac, "PartialAmnesiac": lambda: PartialAmnesiac(keep=0.5)}


def recorded_by(kind, url):
    """Record a training; weights by name."""
    return {name: one.tolist() for name, one in train(kind, url, 2 if kind != "alone" else 1, **DENSE).items()}


def forget(url, weights, method, repair, kind, record=False):
    """Edit and repair; every repair batch is all of the data to keep."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    model, processes = Cut(kind), 1 if kind == "alone" else 2
    model.load_state_dict({name: torch.tensor(one) for name, one in weights.items()})
    trainer = {"accelerator": "cpu", "devices": processes} | ({"strategy": strategy_of(kind)} if processes > 1 else {})
    data = DataLoader(IdDataset(SAMPLES), (SAMPLES - len(IDS)) // processes, shuffle=True)
    result = unlearn(
        model,
        IDS,
        method=METHODS[method](),
        data=data,
        store=url,
        trainer=trainer,
        then=FineTune(max_steps=3) if repair else None,
        record=record,
        force=True,
        batch_norm="keep",
        probe_samples=0,
        seed=3,
    )
    parameters = {name: one.tolist() for name, one in result.model.named_parameters()}
    return weights_digest(result.model), parameters, result.notes


def close(one, other):
    for name, values in one.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(other[name]), rtol=1e-4, atol=1e-6)


QUICK = {("alone", "PartialAmnesiac", "ddp"), ("ddp", "PartialAmnesiac", "fsdp2")}
CASES = [
    pytest.param(by, method, again, marks=() if (by, method, again) in QUICK else pytest.mark.slow)
    for by in ("alone", "ddp", "fsdp2", "fsdp1")
    for method in METHODS
    for again in ("ddp", "fsdp2", "fsdp1")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("by", "method", "again"), CASES)
def test_the_number_of_processes_changes_nothing(gloo_pool, tmp_path, by, method, again):
    url = str(tmp_path / "store")
    weights = recorded_by(by, url) if by == "alone" else gloo_pool.run(recorded_by, by, url)[0]
    digest, _, _ = forget(url, weights, method, False, "alone")
    assert [one[0] for one in gloo_pool.run(forget, url, weights, method, False, again)] == [digest] * 2
    _, alone, _ = forget(url, weights, method, True, "alone")
    for _, repaired, _ in gloo_pool.run(forget, url, weights, method, True, again):
        close(repaired, alone)
    # One process may also write what it does into the store of two.
    recorded, parameters, notes = forget(url, weights, method, True, "alone", record=True)
    assert parameters == alone
    assert not notes
    store = DeltaStore.open(url)
    model = Cut("alone")
    model.load_state_dict({name: torch.tensor(one) for name, one in parameters.items()})
    assert store.state_of(recorded) is not None
    assert set(DeletionRequest(IDS).plan(store, model).honoured_ids) == set(IDS)


def repair(url, weights, kind):
    """A pass that trains, recorded by the processes that shard it."""
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    model = Cut(kind)
    model.load_state_dict({name: torch.tensor(one) for name, one in weights.items()})
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": strategy_of(kind)}
    data = DataLoader(IdDataset(SAMPLES), (SAMPLES - len(IDS)) // 2, shuffle=True)
    options = {"method": FineTune(max_steps=3), "data": data, "store": url, "trainer": trainer, "probe_samples": 0}
    result = unlearn(model, IDS, seed=3, **options)
    return {name: one.tolist() for name, one in result.model.named_parameters()}, result.notes


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_steps_of_a_sharded_pass_are_recorded_and_known_to_the_whole_model(gloo_pool, tmp_path, kind):
    url = str(tmp_path / "store")
    weights = gloo_pool.run(recorded_by, kind, url)[0]
    steps = DeltaStore.open(url).n_steps
    (parameters, notes), other = gloo_pool.run(repair, url, weights, kind)
    assert other == (parameters, notes)
    assert not notes
    store, model = DeltaStore.open(url), Cut("alone")
    model.load_state_dict({name: torch.tensor(one) for name, one in parameters.items()})
    assert store.n_steps == steps + 3
    plan = DeletionRequest([0]).plan(store, model)  # a sample that the repair has seen as well
    assert {steps, steps + 1, steps + 2} <= set(plan.steps.tolist())
    # Everything that was recorded takes the whole model back to its initial weights.
    every = accumulate(store, dict.fromkeys(range(store.n_steps), 1.0))
    for name, initial in store.initial_weights().items():
        found = model.get_parameter(name).detach().double() - every[name]
        torch.testing.assert_close(found, initial.double(), rtol=1e-5, atol=1e-6)
