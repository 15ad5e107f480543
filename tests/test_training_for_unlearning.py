"""The page on training for a later deletion: its code runs as it stands."""

import re
from pathlib import Path

import pytest
from lightning import seed_everything

from tests.helpers.recorded import XYClassifier
from tests.test_choosing_a_method import Data

PAGE = Path(__file__).parents[1] / "docs" / "training-for-unlearning.md"


@pytest.mark.filterwarnings("ignore")  # an ordinary Trainer with its defaults, whose warnings are Lightning's business
def test_the_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    names = {"model": XYClassifier(), "datamodule": Data()}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    assert names["monitor"].history[-1].step > 1
    assert names["monitor"].history[-1].unlearning_error > 0
    assert names["twins"].paired
    assert names["twins"].verification_error() > 0
    assert "UnlearningErrorRecord" in capsys.readouterr().out


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
