"""The page on scaling: every number in its worked cases is what its commands print, and its formulas are the code's."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lightning_unlearn.cli import main
from lightning_unlearn.deltas import recording_seconds
from lightning_unlearn.deltas.recording_advice import human_bytes
from lightning_unlearn.deltas.recording_cost import touched_share
from lightning_unlearn.deltas.recording_rates import ASSUMED_DEVICE, ASSUMED_NETWORK
from lightning_unlearn.store import expected_size

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
FIT = PAGE.with_name("recording-cost-fit.json")


def commands():
    """Label -> arguments of each command of the page."""
    found = {}
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command, hash_, label = line.partition("#")
            if hash_ and command.startswith("$ lightning-unlearn plan-recording"):
                found[label.strip()] = shlex.split(command)[2:]
    return found


def milliseconds(value):
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def cells(found):
    """A row of the tables, from what a command prints as JSON."""
    memory, seconds = found["memory"], found["seconds"]
    return [
        human_bytes(found["bytes"]["total"]),
        human_bytes(found["step_bytes"]),
        milliseconds(seconds["inline"]),
        milliseconds(seconds["threads"]),
        f"{found['share_of_step']:.1%}",
        human_bytes(memory["device"]),
        human_bytes(memory["host"]),
        human_bytes(memory["start"]),
        milliseconds(seconds["checkpoint"]),
        f"{found['touched_share']:.2%}",
    ]


def printed(label, capsys):
    main([*commands()[label], "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("label", commands())
def test_the_tables_are_what_the_commands_print(label, capsys):
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {label} |"))
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == cells(printed(label, capsys)), label


def test_every_row_has_its_command():
    text = PAGE.read_text().split("## Worked cases")[1].split("## When")[0]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| [A-D]\d \|", line)]
    assert rows == list(commands())
    assert len(rows) >= 8


def test_the_constants_and_assumptions_are_those_of_the_code():
    text = " ".join(PAGE.read_text().split())
    for said in (
        f"{expected_size._LEFT_ALONE:.0%} of a layer",
        f"{expected_size._MASK_FACTOR} of the entropy",
        f"{recording_seconds.PRUNED_KERNELS} kernels",
        f"{recording_seconds.PRUNED_BYTES} bytes for each entry and {recording_seconds.KEPT_BYTES} for each kept one",
        f"{recording_seconds.WHOLE_KERNELS} kernels and {recording_seconds.WHOLE_BYTES} bytes",
        f"{ASSUMED_DEVICE.memory_bandwidth / 1e12:.1f} TB/s",
        f"{ASSUMED_DEVICE.launch * 1e6:.0f} µs a launch",
        f"{ASSUMED_DEVICE.host_link / 1e9:.0f} GB/s to the host",
        f"{ASSUMED_NETWORK.bandwidth / 1e9:.0f} GB/s for each rank",
    ):
        assert said in text, said
    for value_dtype, row in expected_size._ZSTD_VALUE.items():
        cells = [f"`{value_dtype}`", *(f"{one:.2f}" for one in row)]
        assert f"| {' | '.join(cells)} |" in text, value_dtype


def test_the_constants_are_the_medians_that_were_measured():
    measured = {row["constant"]: row["value"] for row in json.loads(FIT.read_text())["rows"]}
    assert round(measured["left alone"], 2) == expected_size._LEFT_ALONE
    assert round(measured["positions / entropy"], 2) == expected_size._MASK_FACTOR
    for value_dtype, row in expected_size._ZSTD_VALUE.items():
        found = [measured[f"{value_dtype}, keep {keep}"] for keep in expected_size._KEEPS]
        assert row == pytest.approx(found, abs=0.0051)


def test_the_touched_shares_that_it_names():
    lines = re.findall(r"^\| ([\d,]+) \|((?: [\d.]+% \|)+)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 4
    for steps, row in lines:
        shares = re.findall(r"([\d.]+)%", row)
        expected = [touched_share(int(steps.replace(",", "")), samples) for samples in (1, 10, 100, 1000)]
        assert shares == [f"{100 * share:.3g}" for share in expected]


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
