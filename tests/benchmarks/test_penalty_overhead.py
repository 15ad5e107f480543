"""The benchmark of penalties runs, and its JSON has the shape that was promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    target = tmp_path / "penalties.json"
    command = [sys.executable, FOLDER / "penalty_overhead.py", "--models", "cnn", "--quick", "--max-iterations", "3"]
    done = subprocess.run([*command, "--json", target], capture_output=True, text=True, timeout=500)  # noqa: S603
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(target.read_text())["rows"]}
    penalties = {"StandardDeviationPenalty", "WeightChangePenalty", "own term"}
    assert rows.keys() == {"off", "UnlearningErrorMonitor(200)"} | penalties
    base = rows["off"]["step_seconds"]
    for name in penalties:
        assert rows[name]["step_seconds"] == pytest.approx(base * (1 + rows[name]["share_percent"] / 100))
    monitor = rows["UnlearningErrorMonitor(200)"]
    assert monitor["iterations"] <= 3
    assert monitor["share_percent"] == pytest.approx(100 * monitor["measurement_seconds"] / (200 * base))
