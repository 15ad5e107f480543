"""A store that A processes recorded is read and applied by B: the steps of one process, and its edit bit for bit."""

import warnings

import pytest
import torch

from lightning_unlearn.deltas.in_place import subtract_plan
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.whole_weights import whole_tensors
from tests.callbacks.sharded_training import DENSE, STEPS, Cut, data_of, replicas_of, train, trainer_of, whole

IDS = [2, 9, 17]


class Forgetting(Cut):
    """Subtracts what a plan says once the strategy has cut it, before the first step."""

    def __init__(self, kind, url, weights):
        super().__init__(kind)
        self.load_state_dict(weights)
        self.url = url

    def on_train_start(self):
        store = DeltaStore.open(self.url)
        plan = DeletionRequest(IDS).plan(store, self)
        subtract_plan(self, plan, store, force=True)
        self.edited = {name: one.clone() for name, one in whole_tensors(self).parameters.items()}


def forget(kind, processes, url, weights):
    warnings.simplefilter("ignore")
    module = Forgetting(kind, url, weights)
    trainer = trainer_of(kind, processes, max_epochs=1, max_steps=1)
    trainer.fit(module, data_of(kind, processes))
    return module.edited


@pytest.fixture
def runner(request):
    """Gives what runs a function on so many processes; in this one where it is one."""

    def of(processes):
        if processes == 1:
            return lambda function, *args, **kwargs: [function(*args, **kwargs)]
        return request.getfixturevalue("gloo_pool" if processes == 2 else "four_processes").run

    return of


CASES = [(1, 2, "fsdp2"), (2, 1, "fsdp2"), (1, 2, "fsdp1"), (2, 1, "ddp")]
MORE = [
    (2, 4, "fsdp2"), (4, 1, "fsdp2"), (4, 2, "fsdp2"), (2, 4, "fsdp1"), (4, 1, "fsdp1"), (2, 4, "tensor"),
    (4, 1, "tensor"), (4, 1, "grid"), (2, 4, "grid"), (2, 4, "ddp"), (4, 1, "ddp"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recorded_by", "applied_by", "kind"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_one_number_of_processes_applies_what_another_recorded(runner, tmp_path, recorded_by, applied_by, kind):
    alone = "alone8" if replicas_of(kind, 4) < 4 else "alone"
    recording = alone if recorded_by == 1 else "tensor" if (kind, recorded_by) == ("grid", 2) else kind
    url, reference = str(tmp_path / "store"), str(tmp_path / "reference")
    weights, *_ = runner(recorded_by)(train, recording, url, recorded_by, **DENSE)
    train(alone, reference, 1, **DENSE)
    store, one = DeltaStore.open(url), DeltaStore.open(reference)
    assert (store.world_size, store.n_steps) == (recorded_by, STEPS)
    for step in range(STEPS):
        assert sorted(store.record(step).sample_ids) == sorted(one.record(step).sample_ids)
        assert store.record(step).batch_size == one.record(step).batch_size
        deltas = store.read(step)
        for name, delta in one.read(step).items():
            numel = weights[name].numel()
            ours, theirs = whole(deltas[name], numel), whole(delta, numel)
            assert float((ours - theirs).abs().max()) <= 1e-6 * max(1.0, float(theirs.abs().max()))
    # Planned and subtracted by one process, whole; by several, each from what it holds; and by hand.
    wanted = {name: value.double() for name, value in weights.items()}
    for step in range(STEPS):
        if set(IDS) & set(store.record(step).sample_ids):
            for name, delta in store.read(step).items():
                wanted[name] -= whole(delta, wanted[name].numel()).view(wanted[name].shape)
    applying = alone if applied_by == 1 else kind
    for edited in runner(applied_by)(forget, applying, applied_by, url, weights):
        assert edited.keys() == weights.keys()
        assert all(torch.equal(edited[name], wanted[name].float()) for name in weights)
