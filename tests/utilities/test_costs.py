"""Seconds, memory and speedup; devices are a pretended allocator, so that nested blocks can be tested anywhere."""

import math
import os
import time
from pathlib import Path

import pytest
import torch

from lightning_unlearn.utilities import costs
from lightning_unlearn.utilities.costs import measure_cost, speedup


class Allocator:
    """What torch keeps for each device: bytes in use, and the most of them since the last reset."""

    def __init__(self, devices):
        self.used, self.peak, self.waited_for = [0] * devices, [0] * devices, []

    def allocate(self, device, amount):
        self.used[device] += amount
        self.peak[device] = max(self.peak[device], self.used[device])

    def reset(self, device):
        self.peak[device] = self.used[device]


@pytest.fixture
def cuda(monkeypatch):
    allocator = Allocator(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak[device])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset)
    monkeypatch.setattr(torch.cuda, "synchronize", allocator.waited_for.append)
    return allocator


def test_seconds_are_wall_time_and_come_at_the_end():
    with measure_cost() as cost:
        assert math.isnan(cost.seconds)
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5
    assert cost.minutes == cost.seconds / 60


def test_a_block_that_fails_is_measured_too():
    with pytest.raises(KeyError), measure_cost() as cost:
        raise KeyError("x")
    assert cost.seconds > 0
    assert costs._running == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_host_growth_is_what_lies_above_the_earlier_peak():
    with measure_cost() as before:
        pass
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    above = 64 * 2**20
    with measure_cost() as cost:
        block = bytearray(before.peak_host_bytes - resident + above)
        block[::4096] = b"x" * len(block[::4096])
        del block
    assert 0.5 * above < cost.host_growth_bytes < 2 * above
    assert cost.peak_host_bytes == before.peak_host_bytes + cost.host_growth_bytes
    with measure_cost() as again:
        pass
    assert again.host_growth_bytes == 0
    assert again.peak_host_bytes >= cost.peak_host_bytes


def test_no_device_is_touched_where_none_is_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("would initialise CUDA"))
    with measure_cost() as cost:
        pass
    assert cost.peak_cuda_bytes == {}


def test_the_peak_of_a_block_is_its_own(cuda):
    cuda.allocate(0, 500)
    cuda.allocate(0, -400)
    with measure_cost() as cost:
        cuda.allocate(0, 50)
        cuda.allocate(0, -50)
        cuda.allocate(2, 7)
        assert cuda.waited_for == [0]
    assert cost.peak_cuda_bytes == {"cuda:0": 150, "cuda:2": 7}
    assert cuda.waited_for == [0, 0, 2], "the clock is read when the devices are done"


def test_a_nested_block_loses_nothing_of_the_outer_one(cuda):
    with measure_cost() as outer:
        cuda.allocate(0, 900)
        cuda.allocate(0, -800)
        with measure_cost() as inner:
            cuda.allocate(0, 20)
            cuda.allocate(1, 30)
        cuda.allocate(0, -100)
    assert inner.peak_cuda_bytes == {"cuda:0": 120, "cuda:1": 30}
    assert outer.peak_cuda_bytes == {"cuda:0": 900, "cuda:1": 30}
    with measure_cost() as outer, measure_cost() as inner:
        cuda.allocate(0, 70)
    assert inner.peak_cuda_bytes == outer.peak_cuda_bytes == {"cuda:0": 90, "cuda:1": 30}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_device():
    with measure_cost() as cost:
        block = torch.empty(2**24, dtype=torch.uint8, device="cuda:0")
        del block
    with measure_cost() as after:
        pass
    assert cost.peak_cuda_bytes["cuda:0"] >= 2**24
    assert after.peak_cuda_bytes.get("cuda:0", 0) <= cost.peak_cuda_bytes["cuda:0"] - 2**24


def test_speedup_is_over_retraining():
    assert speedup(2.0, 30.0) == 15
    assert speedup(30.0, 15.0) == 0.5
    for seconds in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="seconds"):
            speedup(*seconds)
