"""A plan carried out on a sharded model is that of one process, bit for bit, and its entry is written once."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lightning_unlearn.api import unlearn
from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.in_place import subtract_plan
from lightning_unlearn.deltas.ledger import DeletionLedger
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    LightningUnlearnError,
    StoreMismatchError,
    UnsupportedStrategyError,
)
from lightning_unlearn.functional.pruning import Pruning
from lightning_unlearn.methods import PartialAmnesiac
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import (
    apply_change,
    model_signature,
    parameter_distance,
    parameter_norm,
    weights_digest,
)
from lightning_unlearn.utilities.whole_weights import whole_tensors
from tests.callbacks.sharded_training import DENSE, Cut, data_of, train, trainer_of
from tests.helpers.cpu_fsdp import OnCpu

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

IDS = [2, 9, 17]
KEEPS = {"all": None, "half": 0.5, "sum": Pruning(0.3, when="sum")}
SHARDED = ("fsdp2", "fsdp1", "tensor")


def alone_as(kind):
    return "alone8" if kind == "tensor" else "alone"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Stores of trainings in one process, and the weights that they led to."""
    found = {}
    for kind in ("alone", "alone8"):
        url = str(tmp_path_factory.mktemp(kind) / "store")
        module = Cut(kind)
        train(kind, url, 1, module=module, **DENSE)
        found[kind] = url, {name: value.clone() for name, value in module.state_dict().items()}
    return found


def by_hand(kind, url, weights, keep):
    """The whole edit: a float64 change, applied to a plain module."""
    module, store = Cut(alone_as(kind)), DeltaStore.open(url)
    module.load_state_dict(weights)
    plan = DeletionRequest(IDS).plan(store, module, keep=keep)
    apply_change(module, accumulate(store, plan.amounts, keep=keep), scale=-1.0)
    return {name: one.detach() for name, one in module.named_parameters()}


class Editing(Cut):
    """Forgets where the strategy has set it up, and looks at its answers before and after."""

    def __init__(self, kind, url, weights, keep, memory_bytes, record):
        super().__init__(kind)
        self.load_state_dict(weights)
        self.task = url, keep, memory_bytes, record
        self.answers = []

    def validation_step(self, batch, batch_idx):
        self(batch["x"])  # which leaves the outermost parameters gathered

    def on_train_start(self):
        url, keep, memory_bytes, record = self.task
        store = DeltaStore.open(url)
        self.plan = DeletionRequest(IDS).plan(store, self, keep=keep)
        self.signature = model_signature(self)
        self.before = weights_digest(self), parameter_norm(self), parameter_distance(self, store.initial_weights())
        subtract_plan(self, self.plan, store, force=True, memory_bytes=memory_bytes)
        self.edited = whole_tensors(self).parameters
        if record:
            self.entry = DeletionLedger.open(store).record(self.plan, self, method="Amnesiac")
            with pytest.raises(StoreMismatchError, match="made for the weights"):
                subtract_plan(self, self.plan, store, force=True)
            again = DeletionRequest(IDS).plan(store, self)
            with pytest.raises(DeletionRequestError, match="not forgotten yet"):
                subtract_plan(self, again, store, force=True)
            with pytest.raises(UnsupportedStrategyError, match="whole for an undo"):
                DeletionLedger.open(store).undo(self.entry.entry_id, self)

    def training_step(self, batch, batch_idx):
        self.answers.append(self(batch["x"]).detach().clone())
        return super().training_step(batch, batch_idx)


def edit_sharded(kind, url, weights, keep, memory_bytes, record=False):
    module = Editing(kind, url, weights, KEEPS[keep], memory_bytes, record)
    trainer = trainer_of(kind, max_epochs=1, max_steps=1, num_sanity_val_steps=1, limit_val_batches=1)
    trainer.fit(module, data_of(kind), data_of(kind))
    described = module.plan.amounts, module.plan.relative_norm, module.plan.steps.tolist(), module.signature
    entry = module.entry.entry_id if record else None
    return module.edited, described, module.before, module.answers[0], entry


def check(pool, kind, url, weights, keep, memory_bytes=2**30, record=False):
    want = by_hand(kind, url, weights, KEEPS[keep])
    plain, store = Cut(alone_as(kind)), DeltaStore.open(url)
    plain.load_state_dict(weights)
    plan = DeletionRequest(IDS).plan(store, plain, keep=KEEPS[keep])
    entries = []
    for edited, described, before, answers, entry in pool.run(
        edit_sharded, kind, url, weights, keep, memory_bytes, record
    ):
        assert edited.keys() == want.keys()
        assert all(torch.equal(edited[name], want[name]) for name in want)
        assert described == (plan.amounts, plan.relative_norm, plan.steps.tolist(), model_signature(plain))
        initial = store.initial_weights()
        assert before == (weights_digest(plain), parameter_norm(plain), parameter_distance(plain, initial))
        entries.append((entry, answers))
    after = copy.deepcopy(plain)
    after.load_state_dict(want, strict=False)
    # The first step computes with the edited weights, not with what was gathered before.
    by_rank = [answers for _, answers in entries]
    found = by_rank[0] if kind == "tensor" else torch.stack(by_rank, 1).flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(found, after(next(iter(data_of(kind, 1)))["x"]), rtol=1e-5, atol=1e-6)
    return after, [entry for entry, _ in entries]


@pytest.mark.parametrize("kind", SHARDED)
def test_each_process_changes_its_part_to_what_one_process_makes_of_the_whole(gloo_pool, recorded, kind):
    url, weights = recorded[alone_as(kind)]
    check(gloo_pool, kind, url, weights, "all")
    check(gloo_pool, kind, url, weights, "half", memory_bytes=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_also_where_the_sum_is_pruned(gloo_pool, recorded, kind):
    check(gloo_pool, kind, *recorded[alone_as(kind)], "sum", memory_bytes=100)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_the_entry_is_written_once_and_known_to_a_whole_model(gloo_pool, tmp_path, kind):
    url, module = str(tmp_path / "store"), Cut("alone")
    train("alone", url, 1, module=module, **DENSE)
    after, entries = check(gloo_pool, kind, url, module.state_dict(), "all", record=True)
    store = DeltaStore.open(url)
    ledger = DeletionLedger.open(store)
    assert entries == [ledger.entries[0].entry_id] * 2
    assert len(ledger.entries) == 1
    assert store.state_of(weights_digest(after)).edits == (entries[0],)
    assert DeletionRequest(IDS).plan(store, after).honoured_ids == dict.fromkeys(IDS, entries[0])
    ledger.undo(entries[0], after)
    for name, one in after.state_dict().items():
        torch.testing.assert_close(one, module.state_dict()[name])


def test_a_plain_module_is_edited_as_unlearn_does_it(recorded):
    url, weights = recorded["alone"]
    module, store = Cut("alone"), DeltaStore.open(url)
    module.load_state_dict(weights)
    method = PartialAmnesiac(keep=0.5)
    data = data_of("alone", 1)
    options = {"data": data, "store": store, "record": False, "force": True, "probe_samples": 0}
    result = unlearn(module, IDS, method=method, **options).model
    plan = DeletionRequest(IDS).plan(store, module, keep=0.5)
    with pytest.raises(DeletionRequestError, match=r"force=True|can honour"):
        subtract_plan(module, plan, store)
    subtract_plan(module, plan, store, force=True)
    assert weights_digest(module) == weights_digest(result)


def disagreeing(url, weights):
    """The plan of rank 1 is not the one of these weights."""
    module, store = Cut("alone"), DeltaStore.open(url)
    plan = DeletionRequest(IDS).plan(store, None)
    module.load_state_dict(weights)
    if dist.get_rank():
        plan = DeletionRequest(IDS).plan(None)
    root = OnCpu(module, use_orig_params=True)
    before = [one.clone() for one in module.parameters()]
    with pytest.raises(LightningUnlearnError) as raised:
        subtract_plan(module, plan, store, force=True, root=root)
    same = all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert not any(isinstance(one, DTensor) for one in module.parameters())
    return type(raised.value).__name__, str(raised.value), same


def test_what_one_process_cannot_do_none_of_them_does(gloo_pool, recorded):
    zero, one = gloo_pool.run(disagreeing, *recorded["alone"])
    assert zero[:2] == one[:2]
    assert one[0] == "StoreMismatchError"
    assert zero[2] is one[2] is True
