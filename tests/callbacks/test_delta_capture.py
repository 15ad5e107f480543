"""What a step changed, against differences in float64, for weights of every kind and edits of every kind."""

import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.callbacks import host_selection
from lightning_unlearn.callbacks.delta_capture import DeltaCapture
from lightning_unlearn.exceptions import LightningUnlearnError, UnsupportedStrategyError
from lightning_unlearn.functional.pruning import kept_count
from lightning_unlearn.types import RecordingSettings


class Net(nn.Module):
    """Convolutions in two memory formats, tied weights, an embedding, a scalar, a frozen layer, BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Linear(40, 40, bias=False)
        self.tied = nn.Linear(40, 40, bias=False)
        self.tied.weight = self.mix.weight
        self.table = nn.Embedding(50, 6)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(30, 30).requires_grad_(False)


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return Net().to(dtype)


def step(optimizer, seed=0):
    """A step on random gradients; rows of the embedding that no sample touched have none."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if parameter.shape == (50, 6):
                    parameter.grad[5:] = 0
    optimizer.step()


def sgd(module, **kwargs):
    return torch.optim.SGD([one for one in module.parameters() if one.requires_grad], lr=0.1, **kwargs)


def snapshot(module):
    return {name: one.detach().double().clone() for name, one in module.named_parameters()}


def dense(module, deltas):
    """Name -> change in float64, from deltas alone."""
    names = list(dict(module.named_parameters()))
    sizes = [one.shape for one in module.parameters()]
    changes = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zip(names, sizes, strict=True)}
    for delta in deltas:
        flat = changes[names[delta.layer]].view(-1)
        if delta.indices is None:
            flat.copy_(delta.values)
        else:
            flat[delta.indices] = delta.values.double()
    return changes


def pruned(change, keep):
    """The largest entries of a change, by a stable sort."""
    flat = change.float().reshape(-1).numpy()
    order = np.argsort(-np.abs(flat.astype(np.float64)), kind="stable")[: kept_count(flat.size, keep)]
    rest = np.zeros(flat.size)
    rest[order] = flat[order]
    return torch.from_numpy(rest).view(change.shape)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [0.1, 0.45, 1.0])
@pytest.mark.parametrize("share", [True, False])
def test_the_largest_changes_of_every_layer(dtype, keep, share):
    module = network(dtype)
    optimizer = sgd(module, momentum=0.9)
    capture = DeltaCapture(module, RecordingSettings(keep=keep), share=share)
    capture.watch(optimizer)
    for number in range(3):
        before = snapshot(module)
        assert capture.watch(optimizer).edited == ()
        step(optimizer, number)
        change = capture.changes(optimizer, number)
        assert change.edited is False
        assert change.pruning_error is None
        found, after = dense(module, change.deltas), snapshot(module)
        for name in before:
            assert torch.equal(found[name], pruned(after[name] - before[name], keep)), name


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(host_selection, "_ENTRIES_PER_THREAD", 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        test_the_largest_changes_of_every_layer(torch.float32, 0.1, True)
        module = network()
        optimizer = sgd(module)
        capture = DeltaCapture(module, RecordingSettings(keep=0.1))
        capture.watch(optimizer)
        step(optimizer)
        capture.changes(optimizer, 0)
        assert any(thread.name.startswith("delta-selection") for thread in threading.enumerate())
        step(optimizer)
        with torch.no_grad():
            module.mix.weight[3, 3] = math.inf
        with pytest.raises(LightningUnlearnError, match=r"`mix\.weight` became infinite or NaN in step 1"):
            capture.changes(optimizer, 1)
    finally:
        torch.set_num_threads(threads)


def times_two(module):
    module.mix.weight.data.mul_(2)


def in_place(module):
    with torch.no_grad():
        module.mix.weight.clamp_(-0.01, 0.01)


def another_tensor(module):
    module.mix.weight.data = module.mix.weight.data + 1


def one_entry(module):
    module.mix.weight.data[39, 39] += 1e-3


def another_dtype(module):
    module.mix.weight.data = module.mix.weight.data.double()


@pytest.mark.parametrize("edit", [times_two, in_place, another_tensor, one_entry, another_dtype])
@pytest.mark.parametrize("keep", [0.1, 1.0])
def test_an_edit_is_named_and_not_charged_to_the_step(edit, keep):
    module = network()
    optimizer = sgd(module)
    capture = DeltaCapture(module, RecordingSettings(keep=keep))
    assert capture.watch(optimizer).edited == ()
    step(optimizer)
    assert capture.changes(optimizer, 0).edited is False
    assert capture.drifted() == []
    edit(module)
    assert capture.drifted() == ["mix.weight"]
    before = snapshot(module)
    assert capture.watch(optimizer).edited == ("mix.weight",)
    step(optimizer, 1)
    change = capture.changes(optimizer, 1)
    assert change.edited is True
    wanted = pruned(snapshot(module)["mix.weight"] - before["mix.weight"], keep)
    assert torch.equal(dense(module, change.deltas)["mix.weight"], wanted)
    assert capture.watch(optimizer).edited == ()
    step(optimizer, 2)
    assert capture.changes(optimizer, 2).edited is False


def test_an_edit_before_a_step_that_is_skipped_is_not_reported_later():
    module = network()
    optimizer = sgd(module)
    capture = DeltaCapture(module, RecordingSettings(keep=0.1))
    capture.watch(optimizer)
    times_two(module)
    assert capture.watch(optimizer).edited == ("mix.weight",)
    step(optimizer)
    assert capture.skip(optimizer, 0) is True
    assert capture.watch(optimizer).edited == ()
    step(optimizer)
    assert capture.changes(optimizer, 1).edited is False


def test_edits_belong_to_the_optimizer_whose_weights_they_are():
    module = network()
    first = torch.optim.SGD(module.conv.parameters(), lr=0.1)
    second = torch.optim.SGD(module.mix.parameters(), lr=0.1)
    capture = DeltaCapture(module, RecordingSettings(keep=0.1))
    capture.watch(first)
    capture.watch(second)
    times_two(module)
    assert capture.watch(first).edited == ()
    step(first)
    assert capture.changes(first, 0).edited is False
    assert capture.watch(second).edited == ("mix.weight",)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("keep", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_pruning_error_is_that_of_float64(scope, criterion, keep, dtype):
    module = network(dtype)
    optimizer = sgd(module)
    settings = RecordingSettings(keep=keep, scope=scope, criterion=criterion)
    capture = DeltaCapture(module, settings)
    capture.watch(optimizer)
    before = snapshot(module)
    step(optimizer)
    change = capture.changes(optimizer, 0, measure=True)
    found, after = dense(module, change.deltas), snapshot(module)
    dropped = math.fsum(float(((after[name] - before[name]).float() - found[name]).square().sum()) for name in before)
    total = math.fsum(float((after[name] - before[name]).float().double().square().sum()) for name in before)
    assert change.pruning_error == pytest.approx(math.sqrt(dropped / total), rel=1e-9)
    assert (change.pruning_error == 0.0) == (keep == 1.0)
    capture.watch(optimizer)
    assert capture.changes(optimizer, 1, measure=True).pruning_error == 0.0  # nothing changed
    assert capture.changes(optimizer, 2).deltas == []


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_one_threshold_over_all_layers(criterion):
    module = network()
    optimizer = sgd(module)
    capture = DeltaCapture(module, RecordingSettings(keep=0.2, scope="global", criterion=criterion), seed=5)
    capture.watch(optimizer)
    before = snapshot(module)
    step(optimizer)
    found, after = dense(module, capture.changes(optimizer, 0).deltas), snapshot(module)
    names = [name for name, one in module.named_parameters() if one.requires_grad]
    changes = torch.cat([(after[name] - before[name]).reshape(-1) for name in names])
    ours = torch.cat([found[name].reshape(-1) for name in names])
    if criterion == "magnitude":
        assert torch.equal(ours, pruned(changes, 0.2))
    else:
        kept = ours != 0
        assert torch.equal(ours[kept], changes[kept].float().double())
        # Rows of the embedding without a gradient may be drawn as well.
        assert 0.15 * ours.numel() < int(kept.sum()) <= kept_count(ours.numel(), 0.2)


def test_what_is_frozen_costs_nothing_and_what_is_unfrozen_in_time_is_recorded():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    capture = DeltaCapture(module, RecordingSettings(keep=1.0))
    capture.watch(optimizer)
    held = {layer.name for layer in capture._layers.values() if layer.before is not None}
    assert held == {name for name, one in module.named_parameters() if one.requires_grad}
    module.frozen.requires_grad_(True)
    before = snapshot(module)
    capture.watch(optimizer)
    step(optimizer)
    found = dense(module, capture.changes(optimizer, 0).deltas)
    wanted = pruned(snapshot(module)["frozen.weight"] - before["frozen.weight"], 1.0)
    assert wanted.count_nonzero()
    assert torch.equal(found["frozen.weight"], wanted)


def test_what_is_unfrozen_within_a_step_is_an_error_and_not_a_loss():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    capture = DeltaCapture(module, RecordingSettings(keep=0.1))
    capture.watch(optimizer)
    module.frozen.requires_grad_(True)
    step(optimizer)
    with pytest.raises(LightningUnlearnError, match=r"`frozen\.weight` to be frozen or trainable throughout a step"):
        capture.changes(optimizer, 0)


def test_complex_weights_are_refused():
    module = nn.ParameterDict({"phase": nn.Parameter(torch.ones(3, dtype=torch.complex64))})
    with pytest.raises(UnsupportedStrategyError, match="phase"):
        DeltaCapture(module, RecordingSettings(keep=0.1)).watch(torch.optim.SGD(module.parameters(), lr=0.1))


def test_a_change_of_the_memory_format_in_the_middle_is_logical_order_all_the_same():
    module = network()
    optimizer = sgd(module)
    capture = DeltaCapture(module, RecordingSettings(keep=0.1))
    capture.watch(optimizer)
    module.conv.to(memory_format=torch.channels_last)
    module.last.to(memory_format=torch.contiguous_format)
    before = snapshot(module)
    assert capture.watch(optimizer).edited == ()
    step(optimizer)
    found, after = dense(module, capture.changes(optimizer, 0).deltas), snapshot(module)
    for name in ("conv.weight", "last.weight"):
        assert torch.equal(found[name], pruned(after[name] - before[name], 0.1))
