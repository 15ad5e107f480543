"""The README's code, run as it stands there, in one go."""

import re
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import DeltaStore
from tests.helpers.recorded import XYClassifier

ROWS = 960
README = Path(__file__).parents[1] / "README.md"


class Data(LightningDataModule):
    """A user's data, with eight rows of one user."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(ROWS + 300, 6, generator=generator)
        y = x[:, :3].argmax(1)
        ends = [(0, ROWS), (ROWS, ROWS + 150), (ROWS + 150, ROWS + 300)]
        self.train, self.val, self.test = (TensorDataset(x[start:stop], y[start:stop]) for start, stop in ends)
        self.user_of_row = [f"user-{4711 + row // 8}" for row in range(ROWS)]

    def train_dataloader(self):
        return DataLoader(self.train, 32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 100)

    def test_dataloader(self):
        return DataLoader(self.test, 100)


@pytest.mark.filterwarnings("ignore")  # an ordinary Trainer with its defaults, whose warnings are Lightning's business
def test_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {"model": XYClassifier(), "datamodule": Data()}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)  # noqa: S102
    assert (tmp_path / "forgotten.ckpt").exists()
    assert names["result"].method in ("NegGradPlus", "LabelFlipping")
    out = capsys.readouterr().out
    assert "grouped" in out
    store = DeltaStore.open("deltas/")
    assert not len(store.steps_of(["user-4711"]))
    assert len(store.steps_of(["user-4712"]))
    assert names["verdict"].verdict in out


def test_readme_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
