"""The page on choosing a method: it names every method, and its code runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_unlearn import DeltaRecorder, methods
from lightning_unlearn.methods import METHODS
from tests.helpers.recorded import BATCH, ROWS, EpochOrder, XYClassifier, datasets

PAGE = Path(__file__).parents[1] / "docs" / "choosing-a-method.md"
NEWCOMERS = [60, 61]


class Growing(EpochOrder):
    """The newcomers come in from the third epoch on."""

    def __iter__(self):
        return iter(row for row in super().__iter__() if self.epoch >= 2 or row not in NEWCOMERS)

    def __len__(self):
        return len(list(iter(self)))


class Data(LightningDataModule):
    def train_dataloader(self):
        train, _ = datasets()
        return DataLoader(train, BATCH, sampler=Growing(ROWS))

    def val_dataloader(self):
        return DataLoader(datasets()[1], 64)


def test_the_page_names_every_method_by_purpose_or_family():
    named = set(re.findall(r"`([A-Za-z0-9]+)[`(]", PAGE.read_text()))
    assert set(METHODS) <= named, "give it a row in docs/choosing-a-method.md"
    lines = [line for line in PAGE.read_text().split("## By family")[1].split("##")[0].splitlines() if "`" in line]
    for name in METHODS:
        assert sum(f"`{name}`" in line for line in lines if line.startswith("|")) == 1, f"{name} is of one family"


def test_what_the_page_says_of_needs_is_what_the_methods_declare():
    text = PAGE.read_text()
    for row, unwanted in [
        ("samples that must not be read any more", methods.Requirement.FORGET_DATA),
        ("no training on the data to keep", methods.Requirement.RETAIN_DATA),
    ]:
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
        found = [name for name in re.findall(r"`([A-Za-z0-9]+)`", line) if name in METHODS]
        assert len(found) >= 4
        assert not [name for name in found if unwanted in METHODS[name].requires]


@pytest.mark.filterwarnings("ignore")  # an ordinary Trainer with its defaults, whose warnings are Lightning's business
def test_the_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    model = XYClassifier()
    saving = ModelCheckpoint("checkpoints", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    recorder = DeltaRecorder("deltas/", keep=1.0)
    Trainer(max_epochs=4, callbacks=[recorder, saving], reload_dataloaders_every_n_epochs=1, **quiet).fit(model, Data())
    names = {"model": model, "datamodule": Data(), "newcomers": NEWCOMERS, "MyModule": XYClassifier}
    names["loader"] = DataLoader(datasets()[0], BATCH, shuffle=True)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    ran = []
    for block in blocks:
        names["result"] = None
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
        ran += [names["result"].method] if names["result"] else []
    assert ran == ["NegGradPlus", "Scrub", "Level"]
    assert names["exact"].method == "Rewind"
    assert names["sisa"].deleted == tuple(NEWCOMERS)
    printed = capsys.readouterr().out
    assert "come before the first one touched" in printed
    assert "of a training from the start" in printed
    marks = torch.tensor([0, 1, 2, 3, 4, 5] * 20)
    drawn = names["Graded"]().wrong_targets(marks, 6)
    assert set((marks - drawn).abs().tolist()) == {2, 3, 4}
    assert 0 <= int(drawn.min()) <= int(drawn.max()) <= 5


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
