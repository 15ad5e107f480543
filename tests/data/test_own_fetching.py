"""Steps that fetch their batches themselves: what is recorded is what was trained on, or it is refused."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.data.own_fetching import FetchWatch
from lightning_unlearn.exceptions import MissingRequirementError, UnlearningWarning, UnsupportedStrategyError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.replay import assert_leads_to, same_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:`training_step` fetches its own batches"),
]
DENSE = {"keep": 1.0, "value_dtype": "float32"}


class Fetching(BoringClassifier):
    """Trains on `per_step` batches at once; `seen` has one entry a step."""

    def __init__(self, per_step=1):
        super().__init__()
        self.per_step = per_step

    def training_step(self, dataloader_iter):
        batches = self.fetch(dataloader_iter)
        parts = [part for batch in batches for part in (batch if isinstance(batch, list) else [batch])]
        self.seen.append([index for part in parts for index in part["index"].tolist()])
        return sum(functional.cross_entropy(self(part["x"]), part["y"]) for part in parts)

    def fetch(self, dataloader_iter):
        batches = []
        for _ in range(self.per_step):
            try:
                batches.append(next(dataloader_iter)[0])
            except StopIteration:
                if not batches:
                    raise
                break
        return batches


class OneAhead(Fetching):
    """A pipeline: each step trains on what the one before has fetched."""

    waiting = None

    def fetch(self, dataloader_iter):
        if self.waiting is None:
            self.waiting = next(dataloader_iter)[0]
        batch, self.waiting = self.waiting, next(dataloader_iter)[0]
        return [batch]


class Manual(Fetching):
    """Two steps on what was fetched once."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, dataloader_iter):
        optimizer = self.optimizers()
        loss = super().training_step(dataloader_iter)
        self.manual_backward(loss)
        for _ in range(2):
            optimizer.step()
        optimizer.zero_grad()


def fit(store, module=None, data=None, recorder=None, **kwargs):
    torch.manual_seed(3)
    module = module or Fetching()
    callbacks = [] if store is None else [DeltaRecorder(store, **DENSE, **(recorder or {}))]
    quiet_trainer(callbacks=callbacks, **kwargs).fit(module, loader() if data is None else data)
    return module


def recorded(path):
    store = DeltaStore.open(path)
    return [list(store.record(step).sample_ids) for step in range(store.n_steps)]


@pytest.mark.parametrize(
    ("per_step", "make", "kwargs"),
    [
        (1, loader, {}),
        (1, lambda: loader(num_workers=2), {}),
        (1, loader, {"limit_train_batches": 3, "max_epochs": 3}),
        (1, loader, {"accumulate_grad_batches": 2, "max_epochs": 1}),
        (2, lambda: loader(batch_size=5), {}),
        (3, lambda: loader(num_workers=1, persistent_workers=True), {}),
        (4, lambda: loader(batch_size=3, drop_last=True), {"max_epochs": 3}),
        (1, lambda: CombinedLoader([loader(batch_size=8), loader(batch_size=8)], "min_size"), {}),
    ],
)
def test_ids_are_those_of_the_batches_that_were_fetched_for_the_step(tmp_path, per_step, make, kwargs):
    plain = fit(None, Fetching(per_step), make(), **kwargs)
    module = fit(tmp_path / "s", Fetching(per_step), make(), **kwargs)
    assert plain.seen == module.seen
    assert same_weights(plain, module)
    wanted = module.seen
    if "accumulate_grad_batches" in kwargs:
        groups = [module.seen[start : start + 2] for start in range(0, len(module.seen), 2)]
        wanted = [[index for batch in group for index in batch] for group in groups]
    if isinstance(make(), CombinedLoader):  # one loader after the other, as within a batch; different data
        assert [sorted(sample % 40 for sample in ids) for ids in recorded(tmp_path / "s")] == list(map(sorted, wanted))
    else:
        assert recorded(tmp_path / "s") == wanted
    assert_leads_to(DeltaStore.open(tmp_path / "s"), module)


def test_a_second_step_belongs_to_what_was_fetched_last(tmp_path):
    module = fit(tmp_path / "s", Manual())
    assert recorded(tmp_path / "s") == [batch for batch in module.seen for _ in range(2)]


class Stream(IterableDataset):
    def __iter__(self):
        return (sample for sample in IdDataset(20))


@pytest.mark.parametrize("source", ["index", lambda batch: batch["index"]], ids=["key", "function"])
@pytest.mark.parametrize("make", [loader, lambda: DataLoader(Stream(), batch_size=4)], ids=["map", "stream"])
def test_ids_in_the_batch_are_read_as_it_is_fetched(tmp_path, source, make):
    module = fit(tmp_path / "s", data=make(), recorder={"sample_id": source})
    assert recorded(tmp_path / "s") == module.seen
    assert len(module.seen) == 10


def test_it_is_said_once_what_is_assumed(tmp_path):
    with pytest.warns(UnlearningWarning, match="fetches its own batches") as caught:
        fit(tmp_path / "s")
    assert [warning.category for warning in caught].count(UnlearningWarning) == 1


@pytest.mark.parametrize("recorder", [{}, {"sample_id": "index"}], ids=["position", "batch"])
def test_a_pipeline_across_steps_is_refused_and_its_weights_are_not_known(tmp_path, recorder):
    module = OneAhead()
    with pytest.raises(UnsupportedStrategyError, match=r"2 batches fetched in the first step.* and 1 in"):
        fit(tmp_path / "s", module, loader(batch_size=4), recorder)
    store = DeltaStore.open(tmp_path / "s")
    assert len(store.lineage.states) == 1
    assert store.tip.ranges == ()


def test_a_step_on_batches_of_ones_own_is_refused(tmp_path):
    class Elsewhere(Fetching):
        own = loader()

        def fetch(self, dataloader_iter):
            return [next(iter(self.own))]

    with pytest.raises(MissingRequirementError, match="no batch of the Trainer's loaders"):
        fit(tmp_path / "s", Elsewhere())


class Batches:
    def __iter__(self):
        return iter(loader())


@pytest.mark.parametrize("recorder", [{}, {"sample_id": "index"}], ids=["position", "batch"])
def test_what_is_no_loader_is_refused_before_training(tmp_path, recorder):
    module = Fetching()
    with pytest.raises(UnsupportedStrategyError, match="DataLoader"):
        fit(tmp_path / "s", module, Batches(), recorder)
    assert not module.seen
    assert not DeltaStore.exists(tmp_path / "s")


@pytest.mark.parametrize(
    ("counts", "refused"),
    [
        ([2, 1, 1, 1], True),
        ([3, 1, 1, 1, 1], True),
        ([5, 4, 4, 4], True),
        ([1, 1, 1, 1, 1], False),
        ([2, 1, 2, 1], False),
        ([2, 1, 1, 2], False),
        ([1, 2, 2, 2, 1], False),
        ([2, 1, 1], False),
    ],
)
def test_what_counts_as_fetching_ahead(counts, refused):
    watch = FetchWatch()
    for _ in range(2):

        def run():
            total = 0
            watch.begin(total)
            for count in counts:
                total += count
                watch.begin(total)

        if refused:
            with pytest.raises(UnsupportedStrategyError, match="in the step that fetches it"):
                run()
        else:
            run()
        watch.reset()
