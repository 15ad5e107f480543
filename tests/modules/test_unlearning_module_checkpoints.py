"""Checkpoints of a pass are the user's, and only a pass is resumed from them."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods.fine_tune import FineTune
from lightning_unlearn.modules.unlearning_module import CHECKPOINT_KEY, UnlearningModule
from tests.modules.cases import Joint, User, loader, same, trainer, weights

PROJECT = textwrap.dedent(
    """
    import torch
    from lightning import LightningModule
    from torch.nn import functional

    class Net(LightningModule):
        def __init__(self, width=7):
            super().__init__()
            self.save_hyperparameters()
            self.body = torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.BatchNorm1d(width))
            self.head = torch.nn.Linear(width, 3)

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 42
    """
)

LOADING = textwrap.dedent(
    """
    import sys
    sys.modules["lightning_unlearn"] = None  # importing it fails from here on
    import torch
    from user_project import Net

    folder = sys.argv[1]
    loaded = Net.load_from_checkpoint(f"{folder}/saved/pass.ckpt", weights_only=True)
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    assert loaded.hparams.width == 9, loaded.hparams
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    whole = torch.load(f"{folder}/module.pt", weights_only=False)
    assert type(whole) is Net
    assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())
    print("loaded")
    """
)


@pytest.fixture
def user_project(tmp_path):
    path = tmp_path / "user_project.py"
    path.write_text(PROJECT)
    spec = importlib.util.spec_from_file_location("user_project", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_project"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["user_project"]


def data(parts):
    return UnlearningDataModule(loader(), [1, 2, 3], parts=parts, seed=0)


def test_checkpoints_load_into_the_users_class_in_a_process_without_this_package(tmp_path, user_project):
    model = user_project.Net(width=9)
    method = Joint(max_steps=None, max_epochs=1)
    saver = ModelCheckpoint(tmp_path / "saved", filename="pass")
    wrapped = UnlearningModule(model, method)
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saver]).fit(wrapped, datamodule=data(method.parts))
    wrapped.unwrap()
    model.trainer = None
    torch.save(model.state_dict(), tmp_path / "expected.pt")
    torch.save(model, tmp_path / "module.pt")
    checkpoint = torch.load(tmp_path / "saved" / "pass.ckpt", weights_only=True)
    assert checkpoint["mine"] == 42
    assert checkpoint[CHECKPOINT_KEY] == {"method": "Joint", "parts": ["forget", "retain"]}
    assert set(checkpoint["state_dict"]) == set(user_project.Net().state_dict())
    assert checkpoint["hyper_parameters"] == {"width": 9}
    (tmp_path / "load.py").write_text(LOADING)
    done = subprocess.run(  # noqa: S603
        [sys.executable, tmp_path / "load.py", tmp_path], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.endswith("loaded\n"), done.stderr


class SaveOnce(Callback):
    """Saves after the third batch, or at the end of the first epoch (five batches)."""

    def __init__(self, path, middle):
        self.path, self.middle = path, middle

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.middle and trainer.global_step == 3:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if not self.middle:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("middle", [True, False])
def test_a_pass_is_resumed_from_its_own_checkpoint(tmp_path, middle):
    method, path = Joint(), tmp_path / "pass.ckpt"
    first = trainer(max_steps=5, callbacks=[SaveOnce(path, middle)])
    first.fit(UnlearningModule(User(), method), datamodule=data(method.parts))
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == (3 if middle else 5)

    class Start(Joint):
        @property
        def name(self):
            return "Joint"

        def step(self, host, batch, batch_idx):
            self.seen = getattr(self, "seen", weights(host))
            return super().step(host, batch, batch_idx)

    resumed, model = Start(), User()
    second = trainer(max_steps=12)
    second.fit(UnlearningModule(model, resumed), datamodule=data(method.parts), ckpt_path=path, weights_only=True)
    assert second.global_step == 12
    assert same({name: resumed.seen[name] for name in saved["state_dict"]}, saved["state_dict"])


@pytest.mark.parametrize("of", ["training", "another method"])
def test_other_checkpoints_are_refused(tmp_path, of):
    fitted = trainer(max_steps=2)
    if of == "training":
        fitted.fit(User(), loader())
    else:
        fitted.fit(UnlearningModule(User(), FineTune(max_steps=2)), datamodule=data(("retain",)))
    fitted.save_checkpoint(tmp_path / "other.ckpt")
    model = User(lr=0.7)
    before = weights(model)
    with pytest.raises(UnsupportedStrategyError, match="a checkpoint of a Joint pass, but got 'one of"):
        trainer(max_steps=5).fit(
            UnlearningModule(model, Joint()), datamodule=data(Joint.parts), ckpt_path=tmp_path / "other.ckpt"
        )
    assert same(weights(model), before)


def test_after_unwrapping_nothing_marks_the_users_checkpoint():
    wrapped = UnlearningModule(User(), Joint())
    checkpoint = {}
    wrapped.on_save_checkpoint(checkpoint)
    assert CHECKPOINT_KEY in checkpoint
    wrapped.unwrap()
    checkpoint = {}
    wrapped.on_save_checkpoint(checkpoint)
    assert checkpoint == {}
