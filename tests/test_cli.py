"""The command line, as a user meets it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_unlearn.cli import main
from lightning_unlearn.store.documents import FORMAT_VERSION
from tests.helpers.recorded import record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("cli"))


def test_store_info(recorded, capsys):
    main(["store", "info", recorded.url])
    out = capsys.readouterr().out
    assert "24 on 1 rank" in out
    assert "by position" in out
    assert f"{FORMAT_VERSION}" in next(line for line in out.splitlines() if "format version" in line)


def test_a_place_that_cannot_be_reached(capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["store", "info", "nosuch://bucket/run"])
    said = " ".join(capsys.readouterr().err.split())
    assert "'nosuch://bucket/run' (Protocol not known: nosuch)" in said
    assert "Traceback" not in said


def test_store_info_as_json(recorded, capsys):
    main(["store", "info", recorded.url, "--json", "true"])
    info = json.loads(capsys.readouterr().out)
    assert (info["steps"], info["edited"]) == (24, 0)
    assert {"pruning_error", "rounding_error", "distinct_ids"} <= set(info)


@pytest.mark.parametrize("switch", [["--json"], ["--json", "true"], ["--json=true"]])
def test_a_switch_needs_no_value(recorded, capsys, switch):
    main(["store", "info", *switch, recorded.url])
    assert json.loads(capsys.readouterr().out)["steps"] == 24
    main(["store", "info", recorded.url, *switch])
    assert json.loads(capsys.readouterr().out)["steps"] == 24
    main(["store", "info", recorded.url, "--json", "false"])
    assert "24 on 1 rank" in capsys.readouterr().out


def test_store_verify(tmp_path, capsys):
    recorded = record(tmp_path)
    main(["store", "verify", recorded.url])
    assert "nothing damaged" in capsys.readouterr().out
    segment = max((tmp_path / "store").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[-10] ^= 1
    segment.write_bytes(bytes(data))
    with pytest.raises(SystemExit, match="1"):
        main(["store", "verify", recorded.url])
    assert segment.name in capsys.readouterr().out.replace("\n", "")
    main(["store", "verify", recorded.url, "--repair"])
    capsys.readouterr()
    main(["store", "verify", recorded.url])
    assert "nothing damaged" in capsys.readouterr().out
    lineage = tmp_path / "store" / recorded.store.lineage_file
    lineage.write_bytes(lineage.read_bytes()[:-10])
    with pytest.raises(SystemExit, match="1"):  # what a repair cannot bring back is no success
        main(["store", "verify", recorded.url, "--repair", "true"])
    assert "cannot be repaired" in " ".join(capsys.readouterr().out.split())


def test_an_error_is_shown_as_it_is(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["store", "info", str(tmp_path / "[bold]runs[/]")])
    assert "[bold]runs[/]" in capsys.readouterr().err.replace("\n", "")


def test_methods(capsys):
    main(["methods"])
    out = capsys.readouterr().out
    assert "PartialAmnesiac" in out
    assert "exact" in out


def test_the_page_of_methods_is_what_they_declare(capsys):
    main(["methods", "--markdown"])
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    assert capsys.readouterr().out == page.read_text(), "run `lightning-unlearn methods --markdown > docs/methods.md`"


def test_an_error_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["store", "info", str(tmp_path / "nowhere")])
    assert "StoreMismatchError: Expected `url`" in capsys.readouterr().err


def test_the_demo_replaces_only_its_own_folder(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="1"):
        main(["demo", "--output", str(tmp_path)])
    assert "empty folder" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.slow
def test_demo(tmp_path):
    command = [sys.executable, "-m", "lightning_unlearn", "demo", "--seeds", "2", "--output", str(tmp_path / "demo")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)  # noqa: S603
    assert out.returncode == 0, out.stderr
    assert "report.html" in out.stdout
    arms = json.loads((tmp_path / "demo" / "report.json").read_text())["data"]["arms"]

    def mean(placement, contributor, label, metric):
        found = [
            row["values"][metric]
            for arm in arms
            for row in arm["rows"]
            if (arm["placement"], row["contributor"], row["label"]) == (placement, contributor, label)
        ]
        assert len(found) == 2
        return sum(found) / 2

    # Too good is as suspect as too bad.
    assert 0.4 <= mean("grouped", "mislabelled", "original", "forget_accuracy") <= 1.0
    assert 0.0 <= mean("grouped", "mislabelled", "retrained twin", "forget_accuracy") <= 0.15
    assert 0.0 <= mean("grouped", "mislabelled", "amnesiac + repair", "forget_accuracy") <= 0.3
    assert 0.94 <= mean("grouped", "mislabelled", "amnesiac + repair", "test_accuracy") <= 1.0
    assert 0.1 <= mean("random", "mislabelled", "amnesiac", "test_accuracy") <= 0.9
    assert mean("grouped", "mislabelled", "placebo: amnesiac", "forget_accuracy") > 0.2
    outcomes = {result["outcome"] for arm in arms for result in arm["verdicts"]["clean"].values()}
    assert outcomes <= {"nothing_to_forget", "damaged", "unknown"}
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") >= 8
    # Addresses in it are names of XML vocabularies; nothing is loaded.
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|url\(["']?http|@import""", page)
