"""Results that come later are those that come at once; on a CPU, and on a CUDA device where there is one."""

import math
import threading

import pytest
import torch
from torch import nn

from lightning_unlearn.callbacks import delta_capture
from lightning_unlearn.callbacks.captured_layers import Layer
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.callbacks.device_selection import DeviceSelection
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.types import RecordingSettings

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
SETTINGS = [
    RecordingSettings(keep=0.1),
    RecordingSettings(keep=1.0),
    RecordingSettings(keep=0.3, keep_overrides={"*bias": 1.0}),
    RecordingSettings(keep=0.2, criterion="random"),
    RecordingSettings(keep=0.2, scope="global"),
    RecordingSettings(keep=1.0, scope="global"),
    RecordingSettings(keep=0.1, buffers="record"),
]


def network(device, dtype=torch.float32):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(8), nn.Linear(40, 30)]
    return nn.Sequential(*layers, nn.Embedding(60, 4)).to(device, dtype)


def move(module, optimizer, number):
    """A step whose gradients, and buffers, depend on nothing but its number."""
    generator = torch.Generator().manual_seed(number)
    for parameter in module.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.shape == (60, 4):
            gradient[5:] = 0
        parameter.grad = gradient.to(parameter.device, parameter.dtype)
    optimizer.step()
    module[1].running_mean.add_(number + 1)


@pytest.fixture
def later(monkeypatch):
    """Every device counts as one whose results come later."""
    monkeypatch.setattr(delta_capture, "_has_streams", lambda device: True)


def record(device, settings, steps=8, dtype=torch.float32):
    module = network(device, dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    capture = DeltaCapture(module, settings, seed=3, share=False)
    capture.watch(optimizer)
    changes = []
    for number in range(steps):
        if number == 2:
            module[2].weight.data.mul_(1.5)
        capture.watch(optimizer)
        move(module, optimizer, number)
        changes.append(capture.changes(optimizer, number, measure=number % 2 == 0))
    return changes


def plain(delta):
    indices = None if delta.indices is None else delta.indices.tolist()
    return delta.layer, indices, delta.values.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("order", ["at once", "at the end", "on a thread, backwards"])
def test_later_is_the_same_as_at_once(settings, dtype, device, order, monkeypatch):
    monkeypatch.setattr(delta_capture, "_has_streams", lambda one: False)
    wanted = record(device, settings, dtype=dtype)
    monkeypatch.setattr(delta_capture, "_has_streams", lambda one: True)
    module = network(device, dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    capture = DeltaCapture(module, settings, seed=3)
    capture.watch(optimizer)
    found, pending, threads = {}, [], []

    def read(number, change):
        error = None if change.pruning_error is None else change.pruning_error()
        found[number] = [plain(delta) for delta in change.deltas()], error, change.edited()

    for number in range(len(wanted)):
        if number == 2:
            module[2].weight.data.mul_(1.5)
        assert capture.watch(optimizer).edited == ()
        move(module, optimizer, number)
        change = capture.changes(optimizer, number, measure=number % 2 == 0)
        if order == "at once":
            read(number, change)
        else:
            pending.append((number, change))
    for number, change in reversed(pending) if "backwards" in order else pending:
        if "thread" in order:
            threads.append(threading.Thread(target=read, args=(number, change)))
            threads[-1].start()
        else:
            read(number, change)
    for thread in threads:
        thread.join(30)
    assert [found[number][0] for number in range(len(wanted))] == [
        [plain(one) for one in ours.deltas] for ours in wanted
    ]
    for number, ours in enumerate(wanted):
        assert found[number][2] is ours.edited is (number == 2)
        assert (found[number][1] is None) == (ours.pruning_error is None)
        if ours.pruning_error is not None:
            assert found[number][1] == pytest.approx(ours.pruning_error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_a_change_that_is_not_finite_is_an_error_where_it_is_read(later, device):
    module = network(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    capture = DeltaCapture(module, RecordingSettings(keep=0.1))
    capture.watch(optimizer)
    move(module, optimizer, 0)
    with torch.no_grad():
        module[2].weight[1, 1] = math.nan
    change = capture.changes(optimizer, 7)
    for _ in range(2):
        with pytest.raises(LightningUnlearnError, match=r"`2\.weight` became infinite or NaN in step 7"):
            change.deltas()
    assert change.edited() is False


def layers_of(module):
    return [
        Layer(number, name, one, -(-one.numel() // 10), one.detach().clone())
        for number, (name, one) in enumerate(module.named_parameters())
    ]


def test_no_more_than_three_steps_are_under_way_and_buffers_are_used_again():
    module = network(CPU)
    layers, selection = layers_of(module), DeviceSelection(CPU, RecordingSettings(keep=0.1), seed=0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    under_way, addresses = [], []
    for number in range(7):
        move(module, optimizer, number)
        under_way.append(selection.start(layers, [], number, False, None))
        addresses.append({slot.near.values.data_ptr() for slot in selection._slots if slot.near.values.numel()})
        assert [one._far is None for one in under_way] == [place < number - 2 for place in range(number + 1)]
    assert addresses[2] == addresses[-1]
    assert len(addresses[2]) == 3
    held = [delta.values.clone() for delta in under_way[0].deltas()]
    move(module, optimizer, 9)
    selection.start(layers, [], 9, False, None)
    assert all(torch.equal(one, delta.values) for one, delta in zip(held, under_way[0].deltas(), strict=True))


def test_memory_is_what_is_stated():
    module = network(CPU)
    layers, selection = layers_of(module), DeviceSelection(CPU, RecordingSettings(keep=0.1), seed=0)
    for number in range(3):
        selection.start(layers, [], number, True, None)
    kept = sum(layer.kept for layer in layers)
    held = sum(slot.near.values.nbytes + slot.near.positions.nbytes for slot in selection._slots)
    assert held == 3 * 8 * kept
    assert selection._scratch.nbytes == 4 * max(layer.tensor.numel() for layer in layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_training_thread_does_not_wait():
    module = nn.Linear(512, 512).cuda()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    capture = DeltaCapture(module, RecordingSettings(keep=0.1, buffers="record"))
    capture.watch(optimizer)
    for number in range(2):
        module.weight.grad = torch.ones_like(module.weight)
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step allocates pinned memory
        try:
            capture.watch(optimizer)
            optimizer.step()
            change = capture.changes(optimizer, number, measure=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert change.deltas()
