"""The benchmark of recording runs, and its JSON has the shape that was promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
COLUMNS = {"model", "variant", "keep", "step_seconds", "hook_seconds", "hook_percent", "run_ratio", "run_ratio_iqr"}


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    target = tmp_path / "overhead.json"
    command = [sys.executable, FOLDER / "recording_overhead.py", "--models", "cnn", "--quick", "--json", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "Recording cnn" in done.stdout
    document = json.loads(target.read_text())
    assert document.keys() == {"machine", "rows"}
    assert {"processor", "instructions", "cores", "packages"} <= document["machine"].keys()
    rows = {row["variant"]: row for row in document["rows"]}
    assert rows.keys() == {"off", "capture only", "graves", "topk", "fast", "zstd"}
    for name, row in rows.items():
        assert row.keys() == COLUMNS | {"bytes_per_kept"}
        assert row["model"] == "cnn"
        assert row["step_seconds"] > 0
        if name != "off":
            assert 0 < row["hook_seconds"] < 10 * row["step_seconds"]
            assert row["hook_percent"] == pytest.approx(100 * row["hook_seconds"] / row["step_seconds"])
            assert row["run_ratio"] > 0
    assert rows["fast"]["keep"] == rows["zstd"]["keep"] == rows["topk"]["keep"] == 0.1
    # Of a weight that is kept: its place and two bytes, the same compressed, and four bytes of a dense float32.
    assert 2.5 < rows["fast"]["bytes_per_kept"] < 3.6
    assert 1 < rows["zstd"]["bytes_per_kept"] < 2.4
    assert 4 <= rows["graves"]["bytes_per_kept"] < 4.2
