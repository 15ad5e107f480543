"""The benchmark of shared recording runs on two processes, and its JSON has the shape that was promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
WEIGHTS = 545_098
"""Of the small network."""


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    target = tmp_path / "shared.json"
    command = [sys.executable, FOLDER / "shared_recording.py", "--model", "cnn", "--quick", "--json", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)  # noqa: S603
    assert done.returncode == 0, done.stderr
    rows = {(row["mode"], row["rank"]): row for row in json.loads(target.read_text())["rows"]}
    assert rows.keys() == {(mode, rank) for mode in ("off", "all layers", "shared") for rank in (0, 1)}
    for (mode, _), row in rows.items():
        assert row["step_seconds"] > 0
        if mode != "off":
            assert 0 < row["hook_seconds"] < row["step_seconds"]
            assert row["copy_megabytes"] == pytest.approx(4e-6 * row["entries"])
    assert [rows["all layers", rank]["entries"] for rank in (0, 1)] == [WEIGHTS, WEIGHTS]
    assert sum(rows["shared", rank]["entries"] for rank in (0, 1)) == WEIGHTS
    assert all(rows["shared", rank]["hook_ratio"] > 0 for rank in (0, 1))
