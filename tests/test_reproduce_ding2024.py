"""The study of fine-tuning as unlearning: every kind of job at its smallest, and going on where it was stopped."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import ding2024
import ding2024_classes
import ding2024_settings as settings

from tests.helpers.studies import run_in_two_goes, write_cifar10, write_mnist


@pytest.fixture
def root(tmp_path):
    write_cifar10(tmp_path / "data", rows=80)
    write_mnist(tmp_path / "data", "FashionMNIST", train=200, test=80, packed=False)
    return tmp_path / "data"


def test_a_study_is_written_and_goes_on_where_it_was_stopped(root, tmp_path):
    output = tmp_path / "study"

    def study():
        return ding2024.study("smoke", root, output, workers=1)

    everything = settings.jobs_of(settings.PRESETS["smoke"])
    path = tmp_path / "study.json"
    document = run_in_two_goes(ding2024, study, path, everything, lambda job: job.kind == "linear")
    kinds = {job.kind: document["jobs"][job.key]["rows"] for job in everything}
    assert max(row["miss"] for row in kinds["linear"] if row["over"] != "keep") < 1e-10
    tuned = [row for row in kinds["linear"] if row["model"] == "fine-tuned"]
    assert max(max(row["retain"], row["forget"]) for row in tuned) < 1e-20
    rows = {(row["group"], row["model"], row["value"]): row for row in kinds["class"]}
    assert len(rows) == len(kinds["class"]) == 3 + 10 + 4 + 2
    assert rows["reference", "retrained", 0]["gap"] == 0
    assert all(0 <= row[name] <= 1 for row in rows.values() for name in ("ua", "ra", "ta", "mia", "gap"))
    # At equal weights the two are one method.
    one, other = (rows["alpha", name, 1.0] for name in ("ICE-FT", "CE-FT"))
    assert {**one, "model": "", "seconds": 0} == {**other, "model": "", "seconds": 0}
    assert all(row["steps"] in (2, 4) for key, row in rows.items() if key[0] == "keep" or key[1] == "fine-tuning")
    fits = [(row["model"], row["value"], row["forgotten"]) for row in kinds["fit"]]
    assert fits == [("original", 1, 3), ("fine-tuning", 1, 3)]
    pictures = sorted(path.name for path in tmp_path.glob("study-*.png"))
    assert {"study-linear.png", "study-cifar-10-alpha.png", "study-fashion-mnist-keep.png"} <= set(pictures)
    page = (tmp_path / "study.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    assert study() == 0


def test_the_class_is_in_its_own_parts_only(root):
    drawn = ding2024_classes.draw(settings.PRESETS["smoke"].tasks[1], root, 3, seed=0)
    labels = {name: set(part.tensors[1].tolist()) for name, part in drawn.parts.items()}
    others = set(range(10)) - {3}
    assert labels == {"forget": {3}, "class": {3}, "retain": others, "test": others}
    assert set(drawn.task.train.tensors[1][drawn.task.forget].tolist()) == {3}
    assert 3 in drawn.task.val.tensors[1]


@pytest.mark.parametrize("preset", sorted(settings.PRESETS))
def test_settings_of_every_preset_can_be_run(preset):
    chosen = settings.PRESETS[preset]
    assert len({(one.group, one.model, one.value) for one in ding2024_classes.passes(chosen)}) == len(
        list(ding2024_classes.passes(chosen))
    )
    for share in chosen.linear.shares:
        shared = round(share * chosen.linear.features)
        assert (chosen.linear.features - shared) % 2 == 0
