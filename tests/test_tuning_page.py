"""The page on tuning: its code runs as it stands, with fewer trials, and its file is one that the command takes."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_unlearn.cli import main
from lightning_unlearn.procedures.outcome import save_checkpoint
from tests.tuning.blobs import FORGET, Blobs, trained

PAGE = Path(__file__).parents[1] / "docs" / "tuning.md"


@pytest.mark.filterwarnings("ignore")  # whatever Lightning thinks of `accelerator: auto` here
def test_the_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": trained(), "datamodule": Blobs(), "forget": FORGET}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block.replace("trials=40", "trials=3"), str(PAGE), "exec"), names)  # noqa: S102
    assert len(names["result"].trials) == len(names["narrow"].trials) == 3
    assert names["narrow"].default.settings == {"lr_scale": 0.1}
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    after = [not torch.equal(*pair) for pair in zip(names["forgotten"].model.parameters(), names["model"].parameters(),
                                                    strict=True)]  # fmt: skip
    assert any(after)


def test_its_configuration_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    content = yaml.safe_load(block)
    content["model"] = {"class_path": "tests.tuning.blobs.Linear"}
    content["data"] = {"class_path": "tests.tuning.blobs.Blobs"}
    content |= {"trials": 2, "trainer": {"accelerator": "cpu", "devices": 1}}
    Path("tune.yaml").write_text(yaml.safe_dump(content))
    Path("forget.txt").write_text("\n".join(map(str, FORGET)))
    save_checkpoint(trained(), "runs/last.ckpt")
    main(["tune", "--config", "tune.yaml"])
    assert "NegGradPlus" in capsys.readouterr().out
    held = {path.name for path in Path("tuning").iterdir()}
    assert held >= {"tuned.yaml", "trials.json", "pareto.png", "trials.journal"}


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
