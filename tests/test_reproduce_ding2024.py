"""The study of fine-tuning as unlearning: every kind of job at its smallest, and going on where it was stopped."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import ding2024
import ding2024_classes
import ding2024_settings as settings


def idx(values):
    """A file of the MNIST family."""
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture
def root(tmp_path):
    """Noise in the shape of both data sets, whose first pixels tell the class."""
    generator = np.random.default_rng(0)
    cifar, fashion = tmp_path / "data" / "cifar-10-batches-py", tmp_path / "data" / "FashionMNIST" / "raw"
    cifar.mkdir(parents=True)
    fashion.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = generator.integers(256, size=(80, 3072), dtype=np.uint8)
        (cifar / name).write_bytes(pickle.dumps({"data": pixels, "labels": [row % 10 for row in range(80)]}))
    for part, count in (("train", 200), ("t10k", 80)):
        images = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        (fashion / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (fashion / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return tmp_path / "data"


def test_a_study_is_written_and_goes_on_where_it_was_stopped(root, tmp_path):
    output, run_job = tmp_path / "study", ding2024.run_job

    def study():
        return ding2024.study("smoke", root, output, workers=1)

    def stopped(job, **arguments):
        if job.kind == "linear":
            raise KeyboardInterrupt
        return run_job(job, **arguments)

    everything = settings.jobs_of(settings.PRESETS["smoke"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ding2024, "run_job", stopped)
        with pytest.raises(KeyboardInterrupt):
            study()
    kept = json.loads((tmp_path / "study.json").read_text())["jobs"]
    assert 0 < len(kept) < len(everything)
    assert study() == len(everything) - len(kept)
    document = json.loads((tmp_path / "study.json").read_text())
    assert set(document["jobs"]) == {job.key for job in everything}
    assert {key: document["jobs"][key] for key in kept} == kept  # what was finished is as it was
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
