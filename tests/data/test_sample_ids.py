"""Ids against contents: every sample carries its index, and every batch of a real run is compared."""

import pickle
import threading

import pytest
import torch
from lightning import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.data.sample_ids import BatchIdentity
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    MissingRequirementError,
    UnlearningWarning,
    UnsupportedStrategyError,
)
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import DataFingerprint
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer


class Listener(Callback):
    """Collects (ids, contents) of every batch that is trained on."""

    def __init__(self, identity=None):
        self.identity = identity or BatchIdentity()
        self.ids, self.contents, self.fingerprint = [], [], None

    def on_fit_start(self, trainer, pl_module):
        self.identity.install(trainer)

    def on_train_start(self, trainer, pl_module):
        self.fingerprint = self.identity.fingerprint

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append(self.identity.batch_ids(batch))
        parts = batch if isinstance(batch, list) else [batch]
        self.contents.append([index for part in parts if part is not None for index in part["index"].tolist()])

    def on_train_epoch_end(self, trainer, pl_module):
        self.identity.end_epoch()

    def on_exception(self, trainer, pl_module, exception):
        self.identity.uninstall()

    def teardown(self, trainer, pl_module, stage):
        self.identity.uninstall()


class Module(BoringClassifier):
    """Takes a batch, or a list of batches of which some may be missing."""

    def training_step(self, batch, batch_idx):
        parts = [part for part in (batch if isinstance(batch, list) else [batch]) if part is not None]
        merged = {key: torch.cat([part[key] for part in parts]) for key in ("x", "y", "index")}
        return super().training_step(merged, batch_idx)


class Validating(Module):
    def validation_step(self, batch, batch_idx):
        self(batch["x"])


class VariableBatches:
    """A custom batch sampler of uneven sizes that keeps a state of its own."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += 1
        return iter([order[start : start + size] for start, size in ((0, 5), (5, 2), (7, 9), (16, 4))])

    def __len__(self):
        return 4


class Eager(RandomSampler):
    """Draws in `__iter__` and not at the first `next`."""

    def __iter__(self):
        return iter(list(super().__iter__()))


class EagerBatches:
    """A batch sampler that draws from the global random numbers in `__iter__`, and has no length."""

    def __iter__(self):
        return iter(torch.randperm(40).view(5, 8).tolist())


def none_for_odd_start(samples):
    return None if int(samples[0]["index"]) % 2 else default_collate(samples)


def run(loaders, *, module=None, identity=None, **kwargs):
    listener = Listener(identity)
    trainer = quiet_trainer(callbacks=[listener], **kwargs)
    trainer.fit(module or Module(), loaders)
    return listener, trainer


CASES = {
    "sequential": lambda: loader(shuffle=False),
    "shuffle": lambda: loader(),
    "drop_last": lambda: loader(IdDataset(43), drop_last=True),
    "eager sampler": lambda: loader(sampler=Eager(IdDataset())),
    "batch sampler": lambda: loader(IdDataset(20), batch_sampler=VariableBatches(20)),
    "batches without a length": lambda: loader(batch_sampler=EagerBatches()),
    "weighted with repeats": lambda: loader(sampler=WeightedRandomSampler([1.0] * 5 + [0.1] * 35, 40)),
    "bulk fetch": lambda: DataLoader(
        IdDataset(), batch_size=None, sampler=BatchSampler(RandomSampler(range(40)), 8, False), collate_fn=None
    ),
    "None batches": lambda: loader(batch_size=4, collate_fn=none_for_odd_start),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None")
def test_ids_are_the_contents(case):
    if case == "bulk fetch":
        dataset = IdDataset()

        class Bulk(Dataset):
            def __len__(self):
                return 40

            def __getitem__(self, indices):
                return default_collate([dataset[index] for index in indices])

        loaders = DataLoader(Bulk(), batch_size=None, sampler=BatchSampler(RandomSampler(range(40)), 8, False))
    else:
        loaders = CASES[case]()
    listener, _ = run(loaders)
    assert listener.ids == listener.contents
    assert len(listener.ids) >= (4 if case == "None batches" else 8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"limit_train_batches": 3, "max_epochs": 3},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 3},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_steps": 7, "max_epochs": None},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_ids_are_the_contents_whatever_the_trainer_does(kwargs):
    listener, _ = run(loader(), **kwargs)
    assert listener.ids == listener.contents
    assert listener.ids


@pytest.mark.parametrize(
    "kwargs",
    [{"shuffle": True}, {"persistent_workers": True, "prefetch_factor": 4}, {"collate_fn": none_for_odd_start}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None")
def test_ids_are_the_contents_with_two_workers(kwargs):
    # A limit leaves prefetched batches behind in every epoch.
    listener, _ = run(loader(num_workers=2, batch_size=4, **kwargs), limit_train_batches=6, max_epochs=2)
    assert listener.ids == listener.contents
    assert len(listener.ids) >= 2


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_combined_loaders_over_the_same_data(mode):
    data = IdDataset()
    parts = [loader(Subset(data, range(24)), batch_size=4), loader(Subset(data, range(24, 40)), batch_size=4)]
    listener, _ = run(CombinedLoader(parts, mode), max_epochs=2)
    assert listener.ids == listener.contents
    assert len(listener.ids) == 2 * (4 if mode == "min_size" else 6)
    assert listener.fingerprint == DataFingerprint("position", 40)


def test_loaders_over_different_data_get_different_ids():
    listener, _ = run([loader(IdDataset(8), batch_size=4), loader(IdDataset(6, seed=1), batch_size=3)], max_epochs=1)
    assert sorted(sample for ids in listener.ids for sample in ids) == list(range(14))
    assert listener.fingerprint.length == 14


class Offset(Dataset):
    """Rows whose content says where they are in a concatenation of everything."""

    def __init__(self, start, length):
        self.start, self.data = start, IdDataset(length)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        sample = self.data[index]
        return {**sample, "index": sample["index"] + self.start}


def test_subsets_and_concatenations_give_positions_of_the_underlying_data():
    first, second = Offset(0, 10), Offset(10, 12)
    nested = Subset(ConcatDataset([Subset(first, [3, 1, 7]), first, second]), [0, 2, 4, 12, 14, 20, 24])
    listener, _ = run(loader(nested, batch_size=4))
    assert listener.ids == listener.contents
    assert {sample for ids in listener.ids for sample in ids} >= {3, 7}
    assert listener.fingerprint == DataFingerprint("position", 22)


def test_a_batch_that_was_fetched_ahead_is_forgotten_at_the_end_of_the_epoch():
    listener, _ = run(loader(batch_sampler=EagerBatches()), limit_train_batches=3, max_epochs=3)
    assert listener.ids == listener.contents
    assert len(listener.ids) == 9


def test_validation_in_mid_epoch_is_not_listened_to():
    listener = Listener()
    trainer = quiet_trainer(callbacks=[listener], val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(Validating(), loader(), loader(IdDataset(12, seed=3), shuffle=False))
    assert listener.ids == listener.contents
    assert len(listener.ids) == 10


class Stream(IterableDataset):
    def __iter__(self):
        return (sample for sample in IdDataset(20))


def test_iterable_data_with_ids_in_the_batch_is_one_batch_ahead_and_right():
    for source in ("index", lambda batch: batch["index"]):
        listener, _ = run(DataLoader(Stream(), batch_size=6), identity=BatchIdentity(source))
        assert listener.ids == listener.contents
        assert len(listener.ids) == 8
        assert listener.fingerprint == DataFingerprint("batch")


def test_keys_in_the_batch_may_be_strings():
    listener, _ = run(loader(IdDataset(keys=True)), identity=BatchIdentity("key"), max_epochs=1)
    assert listener.ids == [[f"row-{index}" for index in contents] for contents in listener.contents]


SPLIT = random_split(IdDataset(), [24, 16], generator=torch.Generator().manual_seed(0))
LOADERS = {
    **CASES,
    "half of a split": lambda: loader(SPLIT[0]),
    "a split that is joined again": lambda: loader(ConcatDataset(SPLIT), num_workers=2),
    "persistent workers": lambda: loader(num_workers=2, persistent_workers=True, prefetch_factor=4),
    **{
        mode: lambda mode=mode: CombinedLoader([loader(part, batch_size=4) for part in SPLIT], mode)
        for mode in ("max_size_cycle", "min_size", "max_size")
    },
    "None in one of two": lambda: CombinedLoader(
        [loader(SPLIT[0], batch_size=4, collate_fn=none_for_odd_start), loader(SPLIT[1], batch_size=4)], "min_size"
    ),
}


@pytest.mark.parametrize("case", [case for case in LOADERS if case != "bulk fetch"])
@pytest.mark.parametrize("kwargs", [{}, {"limit_train_batches": 3, "max_epochs": 3}], ids=["all", "limited"])
@pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None")
def test_every_recorded_step_has_the_ids_of_its_batch(case, kwargs, tmp_path):
    """Each row's content carries its index, and the store is compared with it."""
    module = Module()
    trainer = quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s")], **kwargs)
    trainer.fit(module, LOADERS[case]())
    store = DeltaStore.open(tmp_path / "s")
    assert [list(store.record(step).sample_ids) for step in range(store.n_steps)] == module.seen
    assert store.n_steps >= 3


@pytest.mark.filterwarnings("ignore:.*does not support the CombinedLoader")
def test_what_fit_itself_refuses_is_left_to_it(tmp_path):
    trainer = quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s")])
    with pytest.raises(ValueError, match="sequential"):
        trainer.fit(module := Module(), CombinedLoader([loader(), loader()], "sequential"))
    assert not module.seen
    assert "process_dataloader" not in vars(trainer.strategy)


class Pipeline:
    """Like a pipeline of shards: iterable, and no `DataLoader`."""

    def __iter__(self):
        return iter(loader())


@pytest.mark.parametrize("make", [Pipeline, lambda: DataLoader(Stream(), batch_size=4)], ids=["pipeline", "stream"])
def test_streams_are_refused_with_the_remedy_and_recorded_with_it(make, tmp_path):
    module = Module()
    with pytest.raises(UnsupportedStrategyError, match=r"Pass `sample_id=` \(a key of the batch"):
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s")]).fit(module, make())
    assert not module.seen
    assert not DeltaStore.exists(tmp_path / "s")
    for source in ("index", lambda batch: [f"row-{index}" for index in batch["index"].tolist()]):
        module, url = Module(), tmp_path / str(callable(source))
        quiet_trainer(callbacks=[DeltaRecorder(url, sample_id=source)]).fit(module, make())
        store = DeltaStore.open(url)
        recorded = [list(store.record(step).sample_ids) for step in range(store.n_steps)]
        named = [[f"row-{index}" for index in batch] for batch in module.seen] if callable(source) else module.seen
        assert recorded == named


def test_batches_of_a_forgetting_pass_name_the_samples_of_every_part():
    identity = BatchIdentity("index")
    parts = {"forget": {"index": torch.tensor([4, 1])}, "retain": {"index": torch.tensor([7, 9])}}
    assert identity.batch_ids(parts) == [4, 1, 7, 9]


@pytest.mark.parametrize("form", [list, dict, lambda pairs: dict(pairs).__getitem__], ids=["list", "dict", "function"])
def test_sample_keys_replace_positions_also_behind_a_subset(form):
    pairs = [(position, f"user-{position % 7}") for position in range(40)]
    keys = [key for _, key in pairs] if form is list else form(pairs)
    data = Subset(IdDataset(), range(39, 0, -2))
    listener, _ = run(loader(data), identity=BatchIdentity(sample_keys=keys, digest="d"))
    assert listener.ids == [[f"user-{index % 7}" for index in contents] for contents in listener.contents]
    assert listener.fingerprint == DataFingerprint("key", 40, "d")


def shared_workers(loaders, listen):
    torch.manual_seed(5)
    module = Module()
    trainer = quiet_trainer(callbacks=[Listener()] if listen else [])
    trainer.fit(module, loaders)
    return module, torch.rand(3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "made",
    [{}, {"sampler": Eager(IdDataset())}, {"batch_sampler": EagerBatches()}],
    ids=["shuffle", "eager sampler", "eager batches"],
)
def test_training_and_random_numbers_are_bitwise_the_same(workers, made):
    (plain, after), (listened, after_too) = (
        shared_workers(loader(num_workers=workers, **made), listen) for listen in (False, True)
    )
    assert plain.seen == listened.seen
    assert torch.equal(after, after_too)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), listened.parameters(), strict=True))


def test_the_users_loader_and_trainer_are_left_as_they_were():
    loaders = loader()
    before, kind, sampler = dict(vars(loaders)), type(loaders), loaders.batch_sampler
    listener, trainer = run(loaders)
    assert type(loaders) is kind is DataLoader
    assert loaders.batch_sampler is sampler
    assert vars(loaders).keys() == before.keys()
    assert "process_dataloader" not in vars(trainer.strategy)
    assert type(pickle.loads(pickle.dumps(loaders))) is DataLoader  # noqa: S301
    listener.identity.uninstall()
    # A second fit of the same Trainer and loader listens once, not twice.
    trainer.fit_loop.max_epochs = 4
    trainer.fit(trainer.lightning_module, loaders)
    assert listener.ids == listener.contents
    assert len(listener.ids) == 20


def test_a_view_pickles_as_the_users_loader_even_while_training():
    class Pickling(Listener):
        def on_train_start(self, trainer, pl_module):
            self.copy = pickle.loads(pickle.dumps(trainer.train_dataloader))  # noqa: S301

    listener = Pickling()
    quiet_trainer(callbacks=[listener], max_epochs=1).fit(Module(), loader())
    assert type(listener.copy) is DataLoader


def test_persistent_workers_survive_a_fit_and_are_listened_to_in_the_next():
    loaders = loader(num_workers=1, persistent_workers=True, batch_size=10)
    for _ in range(2):
        next(iter(loaders))  # the user's own workers are there before the fit
        listener, _ = run(loaders, max_epochs=2)
        assert listener.ids == listener.contents
        assert len(listener.ids) == 8
    assert sorted(index for batch in loaders for index in batch["index"].tolist()) == list(range(40))


def test_uninstalled_after_an_error_in_mid_epoch():
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("deliberate")
            return super().training_step(batch, batch_idx)

    listener = Listener()
    trainer = quiet_trainer(callbacks=[listener])
    with pytest.raises(RuntimeError, match="deliberate"):
        trainer.fit(Failing(), loader())
    assert "process_dataloader" not in vars(trainer.strategy)
    with pytest.raises(RuntimeError, match="not installed"):
        listener.identity.batch_ids({})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "iterable Stream"),
        (lambda: [default_collate([IdDataset()[0], IdDataset()[1]])], "map-style DataLoader"),
        (lambda: loader(num_workers=2, in_order=False), "in_order"),
    ],
)
def test_what_cannot_be_listened_to_is_refused_before_training(make, match):
    module = Module()
    trainer = quiet_trainer(callbacks=[Listener()])
    with pytest.raises(UnsupportedStrategyError, match=match):
        trainer.fit(module, make() if match != "map-style DataLoader" else Batches(make()))
    assert not module.seen
    assert "process_dataloader" not in vars(trainer.strategy)


class Batches:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_a_batch_without_ids_is_one_clear_error():
    with pytest.raises(MissingRequirementError, match=r"sample_id.*'user'.*\['index', 'x', 'y'\]"):
        run(loader(), identity=BatchIdentity("user"))
    with pytest.raises(MissingRequirementError, match="one id for each of the 8 samples"):
        run(loader(), identity=BatchIdentity(lambda batch: batch["index"][:-1]))
    with pytest.raises(MissingRequirementError, match="0 ids"):
        run(loader(), identity=BatchIdentity(lambda batch: []))
    with pytest.raises(DeletionRequestError, match="an int or a str"):
        run(loader(), identity=BatchIdentity(lambda batch: batch["x"][:, 0]))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_a_function_names_the_ids_of_every_loader_of_a_combined_one(mode, tmp_path):
    """Batches of one size in each: there are twice as many ids as any tensor is long."""

    def ids(batch):
        return [index for part in batch if part is not None for index in part["index"]]

    module = Module()
    parts = [loader(part, batch_size=4) for part in SPLIT]
    trainer = quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "s", sample_id=ids)])
    trainer.fit(module, CombinedLoader(parts, mode))
    store = DeltaStore.open(tmp_path / "s")
    assert [list(store.record(step).sample_ids) for step in range(store.n_steps)] == module.seen
    assert max(map(len, module.seen)) == 8


def test_a_key_of_the_batch_holds_one_id_for_each_sample():
    with pytest.raises(MissingRequirementError, match="one id for each of the 8 samples"):
        run(
            loader(collate_fn=lambda rows: {**default_collate(rows), "id": torch.zeros(8, 3, dtype=torch.int64)}),
            identity=BatchIdentity("id"),
        )


def drops_a_sample(samples):
    return default_collate(samples[1:])


def test_a_batch_shorter_than_its_indices_is_announced_once():
    with pytest.warns(UnlearningWarning, match="as long as the 8 indices.*got 7") as caught:
        run(loader(collate_fn=drops_a_sample))
    assert [warning.category for warning in caught].count(UnlearningWarning) == 1


@pytest.mark.parametrize(
    ("args", "match"),
    [((3,), "sample_id"), ((None, "abc"), "sample_keys"), ((None, 3), "sample_keys"), (("id", ["a"]), "both")],
)
def test_bad_arguments_are_refused(args, match):
    with pytest.raises(ValueError, match=match):
        BatchIdentity(*args)


def ddp_run(kind):
    torch.manual_seed(0)
    data = IdDataset(43)
    loaders = {
        "shuffle": lambda: loader(data, batch_size=4),
        "workers": lambda: loader(data, batch_size=4, num_workers=2),
        "weighted": lambda: loader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 43, 43)),
    }[kind]()
    listener, _ = run(loaders, strategy="ddp", devices=2)
    return listener.ids, listener.contents, threading.active_count()


@pytest.mark.parametrize("kind", ["shuffle", "workers", "weighted"])
def test_two_processes_each_know_their_own(gloo_pool, kind):
    ranks = gloo_pool.run(ddp_run, kind)
    for ids, contents, _ in ranks:
        assert ids == contents
        assert len(ids) == 12
    first_epoch = [sample for ids, _, _ in ranks for batch in ids[:6] for sample in batch]
    assert len(first_epoch) == 44
    if kind != "weighted":
        assert set(first_epoch) == set(range(43))
        assert ranks[0][0][:6] != ranks[0][0][6:]


@pytest.mark.parametrize("kind", ["plain", "subset", "concatenation"])
def test_indices_from_the_end_are_the_same_samples(kind):
    data = IdDataset()
    wrapped = {"plain": data, "subset": Subset(data, range(10, 30)), "concatenation": ConcatDataset([data, data])}[kind]
    drawn = [0, -1, 3, -len(wrapped), 5, 2 - len(wrapped), -2, 1]
    listener = Listener()
    trainer = quiet_trainer(max_epochs=1, callbacks=[listener])
    trainer.fit(BoringClassifier(), loader(wrapped, sampler=drawn, batch_size=4))
    plain, want = range(len(wrapped)), Listener()
    trainer = quiet_trainer(max_epochs=1, callbacks=[want])
    trainer.fit(BoringClassifier(), loader(wrapped, sampler=[plain[one] for one in drawn], batch_size=4))
    assert listener.ids == want.ids
    assert min(min(ids) for ids in listener.ids) >= 0
