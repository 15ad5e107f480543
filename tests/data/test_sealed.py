import pickle

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, random_split

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.data.sealed import check_disjoint, without_test_data
from lightning_unlearn.exceptions import SealedDataError
from tests.helpers.models import BoringClassifier, IdDataset


class Users(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.data = IdDataset(8)

    def setup(self, stage):
        self.was_set_up = stage

    def train_dataloader(self):
        return DataLoader(self.data, 4)

    def val_dataloader(self):
        return DataLoader(IdDataset(4), 4)

    def test_dataloader(self):
        return DataLoader(self.data, 4)

    def predict_dataloader(self):
        return DataLoader(self.data, 4)


def from_datasets():
    return LightningDataModule.from_datasets(IdDataset(8), IdDataset(4), IdDataset(4), IdDataset(4), batch_size=4)


@pytest.mark.parametrize(
    ("make", "again"),
    [
        (Users, lambda data: data),
        (Users, lambda data: pickle.loads(pickle.dumps(data))),  # noqa: S301
        (from_datasets, lambda data: data),  # what Lightning makes of datasets holds local functions
    ],
)
def test_nobody_gets_test_data(make, again):
    users = make()
    sealed = again(without_test_data(users))
    assert isinstance(sealed, type(users))
    split = UnlearningDataModule(sealed, [0, 1])
    for ask in (
        sealed.test_dataloader, sealed.predict_dataloader, split.test_dataloader, split.test_loader,
        lambda: split.with_parts(("forget",)).test_loader(),
    ):  # fmt: skip
        with pytest.raises(SealedDataError, match="left alone while hyper-parameters are chosen"):
            ask()
    assert len(split.forget_loader().dataset) == 2
    assert len(split.val_loader().dataset) == 4
    assert len(users.test_dataloader().dataset) > 0  # the user's own object is what it was
    assert not hasattr(users, "was_set_up")


class WithTestStep(BoringClassifier):
    def test_step(self, batch, batch_idx):
        raise AssertionError("a test batch was seen")


@pytest.fixture
def intact_loaders():
    """Lightning patches the classes of loaders while it asks for one, and leaves them patched where that raises."""

    def all_of(cls):
        return [cls, *(one for sub in cls.__subclasses__() for one in all_of(sub))]

    names = ("__init__", "__setattr__", "__delattr__")
    before = {cls: dict(cls.__dict__) for base in (DataLoader, BatchSampler) for cls in all_of(base)}
    yield
    for cls, attributes in before.items():
        for name in (*names, *(f"__old{name}" for name in names)):
            if name in attributes:
                setattr(cls, name, attributes[name])
            elif name in cls.__dict__:
                delattr(cls, name)


@pytest.mark.usefixtures("intact_loaders")
def test_a_trainer_cannot_test():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(SealedDataError):
        trainer.test(WithTestStep(), datamodule=without_test_data(Users()), verbose=False)


def test_test_loaders_of_a_mapping_are_left_out():
    loaders = {name: DataLoader(IdDataset(4)) for name in ("train", "val", "test")}
    sealed = without_test_data(loaders)
    assert sealed.val_dataloader() is loaders["val"]
    with pytest.raises(SealedDataError):
        sealed.test_dataloader()


def test_parts_that_share_samples_are_refused():
    data = TensorDataset(torch.arange(10))
    first, second = random_split(data, [6, 4], torch.Generator().manual_seed(0))
    check_disjoint({"train": DataLoader(first), "val": DataLoader(second), "test": None})
    check_disjoint({"train": DataLoader(first), "val": DataLoader(TensorDataset(torch.arange(10)))})
    with pytest.raises(ValueError, match="but got '4 samples in both val and test'"):
        check_disjoint({"train": None, "val": DataLoader(second), "test": DataLoader(data)})
    with pytest.raises(ValueError, match="in both train and val"):
        check_disjoint({"train": DataLoader(data), "val": DataLoader(second)})
