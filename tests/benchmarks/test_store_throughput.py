"""The benchmark of the store runs, and its JSON has the shape that was promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    target = tmp_path / "throughput.json"
    command = [sys.executable, FOLDER / "store_throughput.py", "--steps", "4", "--ids", "64000", "--json", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "synthetic classes" in done.stdout
    document = json.loads(target.read_text())
    assert document.keys() == {"machine", "rows"}
    assert str(tmp_path) not in target.read_text()
    rows = {(row["operation"], row["unit"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"])  # no line stands there twice
    assert all(row.keys() == {"operation", "value", "unit", "limit"} for row in rows.values())
    assert all(row["value"] >= 0 for row in rows.values())
    sizes = {name: row["value"] for (name, unit), row in rows.items() if unit == "bytes per kept weight"}
    assert len(sizes) == 3 * 4 * 2
    assert sizes["size, keep 0.1, scaled_float16, not compressed"] == pytest.approx(3.0, abs=0.02)
    assert 1.2 < sizes["size, keep 0.1, bfloat16, zstd"] <= 1.75
    assert 1.2 < sizes["size, keep 0.3, bfloat16, zstd"] <= 1.6
    errors = [rows[f"rounding error, keep 0.1, {name}", "relative L2"]["value"] for name in ("float32", "bfloat16")]
    assert errors[0] == 0.0
    assert 1e-3 < errors[1] < 2**-8
    names = " ".join(name for name, _ in rows)
    for operation in ("encode", "append", "publish", "decode", "sum of 60 steps", "open", "verify", "compact", "among"):
        assert operation in names
