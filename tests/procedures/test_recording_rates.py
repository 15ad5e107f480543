"""Rates that are measured: all there, of a believable size, and nothing left behind."""

import itertools
from collections.abc import Mapping
from dataclasses import fields

import pytest
import torch

from lightning_unlearn.deltas.recording_rates import DEFAULT_RATES
from lightning_unlearn.procedures import recording_rates
from lightning_unlearn.procedures.recording_rates import measure_rates


def test_measure_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_rates, "_LARGE", 1 << 16)
    ticks = itertools.count()
    state = torch.get_rng_state()
    rates = measure_rates(tmp_path, repeats=1, clock=lambda: next(ticks) * 1e-3)
    assert "measured on this machine" in rates.origin
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    # By this clock everything takes a millisecond, so that what is divided by what can be told.
    entries = 4 << 16
    for found in (rates.copy_entry, rates.watch_entry, rates.difference_entry):
        assert found == pytest.approx(1e-3 / entries)
    assert rates.encode_whole["int8"] == pytest.approx(1e-3 / (1 << 16))
    assert rates.encode_kept["int8"] == pytest.approx(1e-3 / (4 * -(-(1 << 16) * 4 // 100)), rel=1e-3)
    assert rates.shard_entry == pytest.approx(1e-3 / (1 << 16))
    assert rates.publish_file == pytest.approx(1e-3)
    assert set(rates.encode_kept) == set(DEFAULT_RATES.encode_kept)


@pytest.mark.slow
def test_a_real_clock(tmp_path):
    rates = measure_rates(tmp_path)
    for item in fields(rates):
        value, usual = getattr(rates, item.name), getattr(DEFAULT_RATES, item.name)
        if item.name in ("origin", "threads", "thread_gain"):
            continue
        pairs = [(value, usual)] if not isinstance(value, Mapping) else [(value[k], usual[k]) for k in value]
        for one, other in pairs:
            assert other / 1000 < one < other * 1000, item.name


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        measure_rates(tmp_path / "nowhere", repeats=1)
