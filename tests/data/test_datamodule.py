import pickle

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError


class Numbers(Dataset):
    def __init__(self, length=20):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class UserData(LightningDataModule):
    """A user's datamodule with a seeded split, hyper-parameters, state and names close to ours."""

    def __init__(self, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.calls = []
        self.seen = 0

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {getattr(stage, 'value', stage)}")
        self.full = Numbers()
        self.train, self.test_loader = random_split(self.full, [14, 6], generator=torch.Generator().manual_seed(1))
        self.val_loader = self.test_loader

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_loader, batch_size=4)

    def test_dataloader(self):
        return DataLoader(self.test_loader, batch_size=4, shuffle=True, drop_last=True)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]


class HookedData(UserData):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert isinstance(batch, torch.Tensor)
        return batch * 10


class Training(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append({part: piece.view(-1).tolist() for part, piece in batch.items()})
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Collecting(Training):
    def __init__(self):
        super().__init__()
        self.validated = []

    def validation_step(self, batch, batch_idx):
        self.validated += batch.view(-1).tolist()


def fit(data, module=None, **kwargs):
    module = Collecting() if module is None else module
    arguments = {"max_epochs": 1, "enable_checkpointing": False, **kwargs}
    trainer = Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **arguments,
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


def flat(loader):
    return [int(value) for batch in loader for value in batch.view(-1)]


def train_ids(data):
    data.setup("fit")
    return sorted(data.train.indices)


def test_batches_have_the_declared_parts_and_the_shorter_is_cycled():
    users = UserData()
    ids = train_ids(UserData())[:3]
    module, _ = fit(UnlearningDataModule(users, ids, parts=("forget", "retain")))
    assert [list(batch) for batch in module.batches] == [["forget", "retain"]] * 3
    assert sorted(value for batch in module.batches for value in batch["retain"]) == sorted(
        set(train_ids(UserData())) - set(ids)
    )
    assert all(sorted(batch["forget"]) == ids for batch in module.batches)


def test_a_single_part_is_a_mapping_as_well():
    module, _ = fit(UnlearningDataModule(DataLoader(Numbers(), batch_size=5), [0, 1]), Training())
    assert all(list(batch) == ["retain"] for batch in module.batches)


def test_it_is_the_users_datamodule_too_and_leaves_it_as_it_was():
    users = UserData()
    kept = set(users.__dict__)
    data = UnlearningDataModule(users, train_ids(UserData())[:2])
    assert isinstance(data, UserData)
    assert data.hparams == users.hparams
    module, trainer = fit(data)
    assert type(users) is UserData
    assert set(users.__dict__) - kept <= {"full", "train", "test_loader", "val_loader"}
    assert users.trainer is trainer
    assert sorted(module.validated) == sorted(users.val_loader.indices)
    assert isinstance(users.train_dataloader(), DataLoader)
    assert data.users_data is users
    assert b"lightning_unlearn" not in pickle.dumps(UserData())


def test_state_is_saved_under_the_users_name(tmp_path):
    users = UserData()
    users.seen = 5
    _, trainer = fit(UnlearningDataModule(users, train_ids(UserData())[:2]))
    trainer.save_checkpoint(tmp_path / "pass.ckpt")
    checkpoint = torch.load(tmp_path / "pass.ckpt", weights_only=True)
    assert checkpoint["UserData"] == {"seen": 5}
    assert checkpoint["datamodule_hyper_parameters"] == {"batch_size": 4}


def test_names_of_the_wrapper_do_not_collide_with_the_users_attributes():
    data = UnlearningDataModule(UserData(), train_ids(UserData())[:2])
    assert flat(data.test_loader()) == UserDataIds.test
    assert isinstance(data.users_data.test_loader, torch.utils.data.Subset)


class UserDataIds:
    test = random_split(range(20), [14, 6], generator=torch.Generator().manual_seed(1))[1].indices


def test_loaders_outside_a_trainer_set_up_once():
    users = UserData()
    data = UnlearningDataModule(users, train_ids(UserData())[:2])
    for _ in range(2):
        assert flat(data.forget_loader()) == sorted(flat(data.forget_loader()), key=users.train.indices.index)
        assert len(flat(data.retain_loader())) == 12
        assert len(flat(data.val_loader())) == 6
        assert len(flat(data.test_loader())) == 6  # neither shuffled nor dropped
    assert users.calls == ["prepare_data", "setup fit", "setup test"]


def test_after_a_fit_the_loaders_use_what_the_trainer_set_up():
    users = UserData()
    data = UnlearningDataModule(users, train_ids(UserData())[:2])
    fit(data)
    data.retain_loader()
    assert users.calls == ["prepare_data", "setup fit"]


def test_positions_refer_to_the_training_loaders_dataset():
    users = UserData()
    ids = train_ids(UserData())[:3]
    data = UnlearningDataModule(users, ids)
    assert sorted(users.train.indices[i] for i in data.forget_positions) == ids
    assert sorted([*data.forget_positions, *data.retain_positions]) == list(range(14))
    assert data.root_length == 20


def test_transfer_hooks_of_the_user_see_one_part():
    ids = train_ids(HookedData())[:3]
    data = UnlearningDataModule(HookedData(), ids, parts=("forget", "retain"))
    module, _ = fit(data)
    assert sorted(module.batches[0]["forget"]) == [10.0 * i for i in ids]
    assert sorted(flat(data.forget_loader())) == [10 * i for i in ids]


def test_hooks_the_user_does_not_have_do_not_appear():
    from lightning.pytorch.utilities.model_helpers import is_overridden

    plain = UnlearningDataModule(DataLoader(Numbers()), [1])
    for name in ("on_after_batch_transfer", "transfer_batch_to_device", "val_dataloader", "prepare_data"):
        assert not is_overridden(name, plain)
    assert is_overridden("train_dataloader", plain)
    hooked = UnlearningDataModule(HookedData(), [1])
    assert is_overridden("on_after_batch_transfer", hooked)
    assert not is_overridden("on_before_batch_transfer", hooked)


def test_other_parts_share_the_split():
    data = UnlearningDataModule(DataLoader(Numbers(), batch_size=4), [1, 2], parts=("forget", "retain"), seed=3)
    repair = data.with_parts(("retain",))
    assert list(repair.train_dataloader()) == ["retain"]
    assert list(data.train_dataloader()) == ["forget", "retain"]
    assert repair.forget_positions.tolist() == data.forget_positions.tolist() == [1, 2]


def test_retain_only_is_ordinary_training_data():
    loader = UnlearningDataModule(DataLoader(Numbers(6), batch_size=4), [1, 2]).retain_only().train_dataloader()
    assert flat(loader) == [0, 3, 4, 5]


def test_plain_loaders_with_evaluation_data():
    loaders = {
        "train": DataLoader(Numbers(8), batch_size=4),
        "val": DataLoader(Numbers(3), batch_size=2),
        "test": [DataLoader(Numbers(2), batch_size=2)][0],
    }
    data = UnlearningDataModule(loaders, [0])
    assert data.has_validation
    module, _ = fit(data)
    assert module.validated == [0, 1, 2]
    assert flat(data.test_loader()) == [0, 1]
    without = UnlearningDataModule(loaders["train"], [0])
    assert not without.has_validation
    assert without.val_loader() is None


def test_loaders_set_on_an_instance_are_found():
    users = LightningDataModule.from_datasets(Numbers(6), batch_size=2)
    users.train_dataloader().pin_memory = False
    data = UnlearningDataModule(users, [5])
    assert data.retain_positions.tolist() == [0, 1, 2, 3, 4]


def test_keys():
    data = UnlearningDataModule(DataLoader(Numbers(6)), ["b"], sample_keys=["a", "b", "b", "c", "a", "b"])
    assert data.forget_positions.tolist() == [1, 2, 5]


def test_a_seed_fixes_the_batches():
    def batches(seed):
        data = UnlearningDataModule(DataLoader(Numbers(), batch_size=4, shuffle=True), [1, 2, 3, 4, 5], seed=seed)
        parts = data.with_parts(("forget", "retain")).train_dataloader()
        return {part: flat(loader) for part, loader in parts.items()}

    assert batches(1) == batches(1) != batches(2)


def test_pickling_keeps_the_split():
    text = pickle.dumps(UnlearningDataModule(UserData(), [0, 1], parts=("forget", "retain")))
    data = pickle.loads(text)  # noqa: S301
    assert isinstance(data, UserData)
    assert isinstance(data, UnlearningDataModule)
    assert data.parts == ("forget", "retain")
    data.setup("fit")
    assert data.users_data.train is data.train


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


class TwoLoaders(UserData):
    def train_dataloader(self):
        return [super().train_dataloader(), super().train_dataloader()]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: UnlearningDataModule(DataLoader(Numbers()), []), DeletionRequestError, "non-empty collection"),
        (lambda: UnlearningDataModule(DataLoader(Numbers()), "ab"), DeletionRequestError, "non-empty collection"),
        (lambda: UnlearningDataModule(DataLoader(Stream()), [1]), UnsupportedStrategyError, "map-style"),
        (lambda: UnlearningDataModule([DataLoader(Numbers())], [1]), UnsupportedStrategyError, "one torch DataLoader"),
        (lambda: UnlearningDataModule({"val": DataLoader(Numbers())}, [1]), UnsupportedStrategyError, "'train'"),
        (lambda: UnlearningDataModule({"trian": DataLoader(Numbers())}, [1]), ValueError, "one of 'train'"),
        (lambda: UnlearningDataModule(DataLoader(Numbers()), [1], parts=("test",)), ValueError, "'forget', 'retain'"),
        (lambda: UnlearningDataModule(DataLoader(Numbers()), [1], parts=()), ValueError, "at least one part"),
        (lambda: UnlearningDataModule(TwoLoaders(), [1]).forget_positions, UnsupportedStrategyError, "ConcatDataset"),
        (
            lambda: UnlearningDataModule(UnlearningDataModule(DataLoader(Numbers()), [1]), [1]),
            TypeError,
            "with_parts",
        ),
        (
            lambda: UnlearningDataModule(DataLoader(Numbers(2)), [0, 1]).retain_loader(),
            DeletionRequestError,
            "all 2 of them",
        ),
        (
            lambda: UnlearningDataModule(DataLoader(Numbers(2)), [0, 1]).train_dataloader(),
            DeletionRequestError,
            "all 2 of them",
        ),
        (lambda: UnlearningDataModule(DataLoader(Numbers(2)), [7]).forget_loader(), DeletionRequestError, "unknown"),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_all_of_the_data_may_be_forgotten_where_nothing_is_retained():
    data = UnlearningDataModule(DataLoader(Numbers(2)), [0, 1], parts=("forget",))
    assert list(data.train_dataloader()) == ["forget"]
    assert data.retain_positions.tolist() == []
