"""Twins against plain loops that seed themselves, bit for bit; and everything that makes them no pair."""

import copy
import hashlib
import itertools
import multiprocessing
import random
import re
import threading

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, WeightedRandomSampler

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    LightningUnlearnError,
    MissingRequirementError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.procedures.twin import train_twins
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.parameters import weights_digest
from tests.helpers.models import quiet_trainer

ROWS, BATCH, EPOCHS, SEED = 22, 4, 3, 5
FORGET = [3, 8, 9]
TRAINER = {"max_epochs": EPOCHS, "accelerator": "cpu", "log_every_n_steps": 1}


class Augmented(Dataset):
    """Every sample comes with noise of all three global generators."""

    def __init__(self, rows=ROWS):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(6) + random.gauss(0, 1) + float(np.random.randn())  # noqa: NPY002
        return self.x[index] + noise, self.y[index], index


class InBatches(Augmented):
    """The same samples, asked for in lists."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def noisy_collate(samples):
    x, y, rows = torch.utils.data.default_collate(samples)
    return x + 0.1 * torch.randn(()), y, rows


class Net(LightningModule):
    """Dropout, momentum, a schedule; keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y, rows = batch
        self.seen += [(self.current_epoch, row, tuple(one.tolist())) for row, one in zip(rows.tolist(), x, strict=True)]
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def seed_all(*parts):
    number = int(hashlib.blake2b(repr((SEED, *parts)).encode(), digest_size=16).hexdigest()[:8], 16)
    random.seed(number), np.random.seed(number), torch.manual_seed(number)  # noqa: NPY002


def order_of(epoch, sampler=None):
    """The batches of an epoch that a plain `shuffle=True` draws, or a batch sampler."""
    seed_all("order", epoch)
    return list(sampler or BatchSampler(RandomSampler(range(ROWS)), BATCH, drop_last=False))


def by_hand(module, data, orders, left_out=(), unit="samples", collate=torch.utils.data.default_collate):
    """What the twin trainer promises, in a plain loop."""
    module = copy.deepcopy(module).train()
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for epoch, batches in enumerate(orders):
        times = dict.fromkeys(range(ROWS), 0)
        for ordinal, rows in enumerate(batches):
            samples = []
            for row in rows:
                seed_all("sample", epoch, row, times[row])
                times[row] += 1
                if row not in left_out:
                    samples.append(data[row])
            if not samples or (unit == "batches" and len(samples) < len(rows)):
                continue
            seed_all("collate", epoch, ordinal)
            x, y, _ = collate(samples)
            seed_all("step", epoch, ordinal)
            optimizer.zero_grad()
            functional.cross_entropy(module.net(x), y).backward()
            optimizer.step()
        scheduler.step()
    return module


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def own_generator_orders(persistent):
    """As a loader with a generator of its own draws them: a seed for its workers first, then the permutation."""
    generator = torch.Generator().manual_seed(11)
    orders = []
    for epoch in range(EPOCHS):
        if epoch == 0 or not persistent:
            torch.empty((), dtype=torch.int64).random_(generator=generator)
        rows = list(RandomSampler(range(ROWS), generator=generator))
        orders.append([rows[start : start + BATCH] for start in range(0, ROWS, BATCH)])
    return orders


@pytest.mark.parametrize("unit", ["samples", "batches"])
@pytest.mark.parametrize("own_generator", [False, True], ids=["global", "own generator"])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_both_are_those_of_a_plain_loop(unit, own_generator, workers):
    children, data, module = set(multiprocessing.active_children()), Augmented(), Net()
    generator = torch.Generator().manual_seed(11) if own_generator else None
    loader = DataLoader(data, BATCH, shuffle=True, generator=generator, collate_fn=noisy_collate, **workers)
    if own_generator:
        orders, state = own_generator_orders("persistent_workers" in workers), generator.get_state()
    else:
        orders = [order_of(epoch) for epoch in range(EPOCHS)]
    twins = train_twins(module, FORGET, data=loader, trainer=TRAINER, unit=unit, seed=SEED)
    assert twins.paired
    assert twins.reasons == ()
    assert same(twins.original, by_hand(module, data, orders, collate=noisy_collate))
    assert same(twins.retrained, by_hand(module, data, orders, FORGET, unit, collate=noisy_collate))
    assert twins.verification_error() > 0
    if own_generator:
        assert torch.equal(generator.get_state(), state)
    assert loader._iterator is None
    assert set(multiprocessing.active_children()) <= children


def with_repeats(data):
    return DataLoader(data, BATCH, sampler=WeightedRandomSampler([1.0] * 3 + [5.0] * (ROWS - 3), ROWS))


class Odd:
    """A batch sampler of the user's with a state that no seed reaches."""

    def __init__(self):
        self.random, self.epochs = random.Random(2), 0

    def __iter__(self):
        self.epochs += 1
        rows = self.random.sample(range(ROWS), ROWS)
        return iter([rows[:5], rows[5 : 5 + self.epochs], rows[10:18]])

    def __len__(self):
        return 3


LOADERS = {
    "repeats": (
        lambda: with_repeats(Augmented()),
        lambda: BatchSampler(WeightedRandomSampler([1.0] * 3 + [5.0] * (ROWS - 3), ROWS), BATCH, drop_last=False),
    ),
    "own batch sampler": (lambda: DataLoader(Augmented(), batch_sampler=Odd()), Odd),
    "asked in lists": (lambda: DataLoader(InBatches(), BATCH, shuffle=True), lambda: None),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_whatever_the_loader(kind):
    make, sampler = LOADERS[kind][0](), LOADERS[kind][1]()
    module = Net()
    orders = [order_of(epoch, sampler) for epoch in range(EPOCHS)]
    twins = train_twins(module, FORGET, data=make, trainer=TRAINER, seed=SEED)
    assert same(twins.original, by_hand(module, Augmented(), orders))
    assert same(twins.retrained, by_hand(module, Augmented(), orders, FORGET))
    if kind == "own batch sampler":
        assert make.batch_sampler.epochs == 0


@pytest.mark.parametrize("unit", ["samples", "batches"])
@pytest.mark.parametrize("workers", [0, 2])
def test_forgetting_what_was_never_drawn_changes_nothing(unit, workers):
    loader = DataLoader(Augmented(), BATCH, num_workers=workers)
    trainer = {**TRAINER, "limit_train_batches": 3}  # rows 0 to 11, in order
    twins = train_twins(Net(), [12, 13, 21], data=loader, trainer=trainer, unit=unit)
    assert same(twins.original, twins.retrained)
    assert twins.verification_error() == 0
    assert twins.original_steps == twins.retrained_steps == 3 * EPOCHS


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_augmented_the_same_in_both_and_anew_in_every_epoch(workers):
    loader = DataLoader(Augmented(), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    twins = train_twins(Net(), FORGET, data=loader, trainer=TRAINER)
    original = {(epoch, row): x for epoch, row, x in twins.original.seen}
    retrained = {(epoch, row): x for epoch, row, x in twins.retrained.seen}
    assert len(original) == ROWS * EPOCHS
    assert len(set(original.values())) == ROWS * EPOCHS
    assert retrained == {key: x for key, x in original.items() if key[1] not in FORGET}


# Of the six batches in order, numbers 0 and 2 are lost.
LIMITS = [
    ({"max_steps": 9}, 6 + 3, 4 + 1),
    ({"max_epochs": 2, "limit_train_batches": 0.5}, 3 + 3, 1 + 1),
    ({"max_epochs": 3, "accumulate_grad_batches": 2}, 3 * 3, 2 * 3),
]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("limits", "original_steps", "retrained_steps"), LIMITS, ids=str)
def test_both_end_with_the_same_batch(limits, original_steps, retrained_steps, workers):
    trainer = {"accelerator": "cpu", "log_every_n_steps": 1, "max_epochs": -1, **limits}
    loader = DataLoader(Augmented(), BATCH, num_workers=workers)
    twins = train_twins(Net(), FORGET, data=loader, trainer=trainer, unit="batches")
    assert twins.paired
    assert twins.retrained.seen == [row for row in twins.original.seen if row[1] // BATCH not in (0, 2)]
    assert (twins.original_steps, twins.retrained_steps) == (original_steps, retrained_steps)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_of_which_nothing_is_left_does_not_end_the_training(workers):
    class Shifting(Odd):
        def __iter__(self):
            self.epochs += 1
            return iter([[0, 1], [2, 3]] if self.epochs == 1 else [[4, 5], [6, 0]])

    loader = DataLoader(Augmented(), batch_sampler=Shifting(), num_workers=workers)
    twins = train_twins(Net(), [0, 1, 2, 3], data=loader, trainer=TRAINER)
    assert twins.paired
    assert [row for epoch, row, _ in twins.retrained.seen] == [4, 5, 6] * 2


def test_nothing_of_the_users_is_changed():
    data, module = DataLoader(Augmented(), BATCH, shuffle=True), Net()
    before, attributes = copy.deepcopy(module.state_dict()), dict(vars(data))
    stopping = EarlyStopping("loss", stopping_threshold=0.0)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    users = LightningDataModule()
    users.train_dataloader = lambda: data
    twins = train_twins(
        module, DeletionRequest(FORGET), data=users, trainer={**TRAINER, "callbacks": [Noting(), stopping]}
    )
    assert Noting.fits == 2
    assert stopping.best_score == torch.tensor(torch.inf)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module.seen == []
    assert vars(data) == attributes
    assert users.trainer is None
    assert twins.original._trainer is None
    assert twins.retrained._trainer is None
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]  # noqa: NPY002


class Noting(Callback):
    """Reports a metric, and counts fits over all of its copies, each of which may see one."""

    fits = 0

    def __init__(self):
        self.mine = 0

    def on_train_start(self, trainer, pl_module):
        self.mine += 1
        assert self.mine == 1
        type(self).fits += 1

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("loss", 1.0)


def test_the_weights_they_started_from():
    module = Net()
    twins = train_twins(module, FORGET, data=DataLoader(Augmented(), BATCH), trainer=TRAINER)
    assert same(twins.initial_module(), module)
    assert same(twins.initial_module(), twins.initial_module())
    travelled = twins.verification_error(twins.initial_weights)
    assert travelled == twins.verification_error(module) > 0
    assert twins.verification_error(module, relative=True) == 1
    assert twins.verification_error(twins.retrained) == 0
    assert twins.verification_error(relative=True) == pytest.approx(twins.verification_error() / travelled)


def test_a_factory_and_a_module_that_builds_itself_late_are_pairs():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.net = None

        def setup(self, stage):
            self.net = nn.Sequential(nn.Linear(6, 3))

    for source in (Net, Late):
        twins = train_twins(source, [20], data=DataLoader(Augmented(), BATCH), trainer={**TRAINER, "max_epochs": 1})
        assert twins.paired
        assert len(twins.initial_weights) == 2 * len([layer for layer in twins.original.net if len(layer.state_dict())])


def test_keys_name_all_rows_of_a_subject():
    keys = [f"user-{row // 5}" for row in range(ROWS)]
    loader = DataLoader(Augmented(), BATCH)
    twins = train_twins(Net(), ["user-1"], data=loader, trainer=TRAINER, sample_keys=keys)
    assert {row for _, row, _ in twins.retrained.seen} == set(range(ROWS)) - {5, 6, 7, 8, 9}


def test_callbacks_of_one_role_and_the_ids_they_record(tmp_path):
    roles = []

    def callbacks(role):
        roles.append(role)
        return [DeltaRecorder(tmp_path / "store", keep=1.0)] if role == "original" else []

    module = Net()
    loader = DataLoader(Augmented(), BATCH, shuffle=True, num_workers=1)
    twins = train_twins(module, FORGET, data=loader, trainer=TRAINER, seed=SEED, callbacks=callbacks)
    assert roles == ["original", "retrained"]
    orders = list(itertools.chain.from_iterable(order_of(epoch) for epoch in range(EPOCHS)))
    store = DeltaStore.open(tmp_path / "store")
    assert [sorted(store.record(step).sample_ids) for step in range(store.n_steps)] == [sorted(one) for one in orders]
    assert store.state_of(weights_digest(twins.original)).n_steps == len(orders)
    # The recorder neither draws nor shifts anything.
    assert same(twins.original, by_hand(module, Augmented(), [order_of(epoch) for epoch in range(EPOCHS)]))


def announced(reason, *args, **kwargs):
    with pytest.warns(UnlearningWarning, match=re.escape(reason)):
        twins = train_twins(*args, **kwargs)
    assert not twins.paired
    assert any(reason in one for one in twins.reasons)
    return twins


def test_other_initial_weights_are_announced():
    seeds = iter((1, 2))

    def factory():
        torch.manual_seed(next(seeds))
        return Net()

    loader = DataLoader(Augmented(), BATCH)
    announced("started from other values of 'net.0.bias'", factory, [20], data=loader, trainer=TRAINER)
    pair = Net(), Net()
    announced("net.3.weight", pair, [20], data=loader, trainer=TRAINER)
    assert pair[0].seen == []
    assert train_twins((pair[0], pair[0]), [20], data=loader, trainer=TRAINER).paired


def test_a_generator_of_the_datasets_own_is_announced():
    class Own(Augmented):
        random = random.Random(1)

        def __getitem__(self, index):
            return self.x[index] + self.random.gauss(0, 1), self.y[index], index

    announced("Batch 0 of epoch 0 was not the same", Net(), [20], data=DataLoader(Own(), BATCH), trainer=TRAINER)


def test_a_second_training_that_ends_early_is_announced():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 3

    def callbacks(role):
        return [Stop()] if role == "retrained" else []

    loader = DataLoader(Augmented(), BATCH)
    announced(
        "ended after (0, 2) (epoch, batch) and the first went on to (2, 5)",
        Net(),
        [20],
        data=loader,
        trainer=TRAINER,
        callbacks=callbacks,
    )


class Broken(Net):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_leaves_nothing_behind(workers):
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(
        Augmented(), BATCH, shuffle=True, generator=generator, num_workers=workers, persistent_workers=workers > 0
    )
    children, module, attributes = set(multiprocessing.active_children()), Broken(), dict(vars(loader))
    state = (generator.get_state(), torch.get_rng_state(), random.getstate())
    users = LightningDataModule()
    users.train_dataloader = lambda: loader
    with pytest.raises(RuntimeError, match="broken"):
        train_twins(module, FORGET, data=users, trainer=TRAINER)
    assert vars(loader) == attributes
    assert torch.equal(generator.get_state(), state[0])
    assert torch.equal(torch.get_rng_state(), state[1])
    assert random.getstate() == state[2]
    assert users.trainer is None
    assert set(multiprocessing.active_children()) <= children
    assert sorted(row for _, _, rows in loader for row in rows.tolist()) == list(range(ROWS))


def test_what_cannot_be_paired_is_refused():
    loader = DataLoader(Augmented(), BATCH)
    shared = nn.Linear(6, 3)

    def sharing():
        module = Net()
        module.net = nn.Sequential(shared)
        return module

    class Locked(Callback):
        def __init__(self):
            self.lock = threading.Lock()

    class Locks(SequentialSampler):
        def __init__(self, data):
            super().__init__(data)
            self.lock = threading.Lock()

    cases = [
        (MissingRequirementError, "Pass the length", {"trainer": None}),
        (MissingRequirementError, "Pass the length", {"trainer": {"accelerator": "cpu"}}),
        (ValueError, "for 2 fits are planned", {"trainer": quiet_trainer()}),
        (DeletionRequestError, "unknown ones: 99", {"forget": [99]}),
        (DeletionRequestError, "at least one|non-empty", {"forget": []}),
        (ValueError, "share no weights", {"module": sharing}),
        (TypeError, "Linear", {"module": lambda: nn.Linear(1, 1)}),
        (TypeError, "a function that builds one", {"module": 3}),
        (UnsupportedStrategyError, "can be copied", {"trainer": {**TRAINER, "callbacks": Locked()}}),
        (UnsupportedStrategyError, "sampler can be copied", {"data": DataLoader(Augmented(), sampler=Locks(range(9)))}),
        (LightningUnlearnError, "zero steps", {"trainer": {**TRAINER, "limit_train_batches": 0}}),
        (ValueError, "unit", {"unit": "epochs"}),
    ]
    for error, match, changed in cases:
        arguments = {"module": Net(), "forget": [3], "data": loader, "trainer": TRAINER, **changed}
        with pytest.raises(error, match=match):
            train_twins(arguments.pop("module"), arguments.pop("forget"), **arguments)
