"""The study of "Unrolling SGD": every kind of job at its smallest, and going on where it was stopped."""

import csv
import json
import lzma
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import studies
import thudi2021
import thudi2021_settings as settings


@pytest.fixture
def root(tmp_path):
    """Noise in the shape of CIFAR-10, and made-up reviews in that of IMDB."""
    generator = np.random.default_rng(0)
    images, texts = tmp_path / "data" / "cifar-10-batches-py", tmp_path / "data" / "IMDB"
    images.mkdir(parents=True)
    texts.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = generator.integers(256, size=(60, 3072), dtype=np.uint8)
        (images / name).write_bytes(pickle.dumps({"data": pixels, "labels": [row % 10 for row in range(60)]}))
    words = {0: ["bad", "dull", "film"], 1: ["good", "fine", "film"]}
    for part in ("train", "test"):
        with lzma.open(texts / f"{part}.csv.xz", "wt", encoding="utf-8", newline="") as packed:
            writer = csv.writer(packed)
            writer.writerow(["label", "id", "rating", "text"])
            for row in range(300):
                text = " ".join(generator.choice(words[row % 2], size=6)) + ",<br />"
                writer.writerow([row % 2, row, 1, text])
    return tmp_path / "data"


def test_a_study_is_written_and_goes_on_where_it_was_stopped(root, tmp_path):
    output, work, run_job = tmp_path / "study", tmp_path / "work", thudi2021.run_job

    def study():
        return thudi2021.study("smoke", root, output, work, workers=1, repeats=20)

    def stopped(job, **arguments):
        if job.kind == "tune":
            raise KeyboardInterrupt
        return run_job(job, **arguments)

    everything = [job for stage in settings.jobs_of(settings.PRESETS["smoke"]) for job in stage]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thudi2021, "run_job", stopped)
        with pytest.raises(KeyboardInterrupt):
            study()
    kept = json.loads((tmp_path / "study.json").read_text())["jobs"]
    assert 0 < len(kept) < len(everything)
    assert study() == len(everything) - len(kept)
    document = json.loads((tmp_path / "study.json").read_text())
    assert set(document["jobs"]) == {job.key for job in everything}
    assert {key: document["jobs"][key] for key in kept} == kept  # what was finished is as it was
    kinds = {job.kind: document["jobs"][job.key]["rows"] for job in everything}
    assert [row["epochs"] for row in kinds["tune"]] == [1, 2]
    assert all(row[name] > 0 for row in kinds["tune"] for name in ("error", "v_original", "v_single"))
    ways = {row["way"] for row in kinds["cost"]}
    assert ways == {"nothing", "single gradient", "retraining", "SISA, 2 shards"}
    assert document["summary"]["toy, v_single, unlearning error e"]["spearman"] > 0.9
    pictures = sorted(path.name for path in tmp_path.glob("study-*.png"))
    assert {"study-toy.png", "study-cifar-10-grid.png", "study-imdb-price.png"} <= set(pictures)
    page = (tmp_path / "study.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    assert study() == 0


def test_what_people_wrote_above_the_marker_stays(tmp_path):
    page, marker = tmp_path / "page.md", studies.marker_of("thudi2021.py")
    page.write_text(f"# Mine\n\nReading.\n\n{marker}\n\nold\n")
    studies.write_page(page, "thudi2021.py", "Title", ["new"])
    assert page.read_text() == f"# Mine\n\nReading.\n\n{marker}\n\nnew\n"
    studies.write_page(tmp_path / "new.md", "thudi2021.py", "Title", ["new"])
    assert (tmp_path / "new.md").read_text() == f"# Title\n\n{marker}\n\nnew\n"


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "study.json"
    studies.save_document(studies.opened(path, "smoke", {"seeds": (1, 2)}), path)
    assert studies.opened(path, "smoke", {"seeds": (1, 2)})["jobs"] == {}
    with pytest.raises(SystemExit, match="another --output"):
        studies.opened(path, "smoke", {"seeds": (1, 3)})
