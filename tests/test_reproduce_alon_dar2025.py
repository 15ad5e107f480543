"""The study of width and unlearning: every kind of job at its smallest, and going on where it was stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import alon_dar2025
import alon_dar2025_data as data
import alon_dar2025_models as models
import alon_dar2025_regions as regions
import alon_dar2025_settings as settings
import alon_dar2025_tables as tables

from lightning_unlearn.report import decision_plane
from tests.helpers.studies import run_in_two_goes, write_cifar10, write_mnist

SMOKE = settings.PRESETS["smoke"]


@pytest.fixture
def root(tmp_path):
    write_cifar10(tmp_path / "data")
    write_mnist(tmp_path / "data", "FashionMNIST")
    return tmp_path / "data"


def test_a_study_is_written_and_goes_on_where_it_was_stopped(root, tmp_path):
    output = tmp_path / "study"
    everything = settings.jobs_of(SMOKE)

    def study():
        return alon_dar2025.study("smoke", root, output, workers=1)

    path = tmp_path / "study.json"
    document = run_in_two_goes(alon_dar2025, study, path, everything, lambda job: job == everything[-1])
    for job in everything:
        rows = document["jobs"][job.key]["rows"]
        wanted = {(goal, model) for goal in settings.GOALS for model in ("original", "retrained", *settings.METHODS)}
        assert {(row["goal"], row["model"]) for row in rows if row["kind"] == "model"} == wanted
        for goal in settings.GOALS:
            for method in settings.METHODS:
                found = tables.of(rows, kind="model", goal=goal, model=method)
                assert [row["lambda"] for row in found] == list(SMOKE.lambdas)
                [tuning] = tables.of(rows, kind="tuning", goal=goal, model=method)
                assert len(tuning["trial_seconds"]) == SMOKE.trials
                assert all(0 <= row[name] <= 1 for row in found for name in ("test_error", "goal_error", "near_change"))
    pictures = sorted(path.name for path in tmp_path.glob("study-*.png"))
    narrow = "study-cifar-10-plane-bias-removal-narrowest.png"
    assert {"study-cifar-10-goal-error.png", "study-fashion-mnist-resnet-18-regions.png", narrow} <= set(pictures)
    page = (tmp_path / "study.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    assert "## Fashion-MNIST, resnet-18" in page
    assert study() == 0


def test_wrong_labels_are_wrong_and_no_image_is_in_two_parts(root):
    task = SMOKE.tasks[0]
    drawn = data.draw(task, root, seed=0)
    changed = drawn.labels != drawn.wrong_labels
    assert changed.nonzero().flatten().tolist() == drawn.ids == list(range(task.forgotten))
    parts = [drawn.images, drawn.validation.tensors[0], drawn.test.tensors[0]]
    assert [len(part) for part in parts] == [task.train, task.validation, task.test]
    assert len(torch.cat(parts).flatten(1).unique(dim=0)) == sum(len(part) for part in parts)
    again = data.draw(task, root, seed=0)
    assert torch.equal(again.images, drawn.images)
    assert torch.equal(again.wrong_labels, drawn.wrong_labels)
    assert not torch.equal(data.draw(task, root, seed=1).images, drawn.images)
    retained = data.StudyData(drawn, drawn.labels, 16, 0, retained=True)
    assert len(retained.train) == task.train - task.forgotten


def test_width_is_the_only_difference(root):
    for family, known in (("small-cnn", None), ("resnet-18", 11_172_170)):
        counts = [sum(one.numel() for one in models.build(family, 3, width).parameters()) for width in (1, 2, 4)]
        assert counts == sorted(counts)
        assert models.build(family, 3, 2)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        if known:
            full = sum(one.numel() for one in models.build(family, 3, 64).parameters())
            assert full == pytest.approx(known, rel=0.01)


def test_a_plane_comes_back_from_its_text():
    corners = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4))
    plane = decision_plane({"original": network, "other": torch.nn.Sequential(*network)}, *corners, resolution=5)
    back = regions.unpacked(json.loads(json.dumps(regions.packed(plane))))
    torch.testing.assert_close(back.coordinates, plane.coordinates)
    torch.testing.assert_close(back.samples, plane.samples)
    assert back.answers == plane.answers
    assert torch.equal(back.classes["original"], plane.classes["original"])
    assert float((back.confidences["other"] - plane.confidences["other"]).abs().max()) <= 0.0501
