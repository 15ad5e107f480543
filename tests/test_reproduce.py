"""The study of "Unrolling SGD": every kind of job at its smallest, and going on where it was stopped."""

import csv
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))  # where the script finds its parts

import studies
import thudi2021
import thudi2021_settings as settings

from tests.helpers.studies import run_in_two_goes, write_cifar10


@pytest.fixture
def root(tmp_path):
    """Noise in the shape of CIFAR-10, and made-up reviews in that of IMDB."""
    generator = np.random.default_rng(0)
    texts = tmp_path / "data" / "IMDB"
    texts.mkdir(parents=True)
    write_cifar10(tmp_path / "data")
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
    output, work = tmp_path / "study", tmp_path / "work"

    def study():
        return thudi2021.study("smoke", root, output, work, workers=1, repeats=20)

    everything = [job for stage in settings.jobs_of(settings.PRESETS["smoke"]) for job in stage]
    path = tmp_path / "study.json"
    document = run_in_two_goes(thudi2021, study, path, everything, lambda job: job.kind == "tune")
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
