"""What every metric of the package must do, whatever it computes: torchmetrics' contract, and two processes = one.

A case is a metric class, its arguments, and a list of updates `(args, kwargs)` small enough to run many times.
"""

import copy
import pickle
from dataclasses import dataclass, field

import torch


@dataclass
class MetricCase:
    """One metric with inputs."""

    cls: type
    updates: list
    init: dict = field(default_factory=dict)

    def make(self):
        return self.cls(**self.init)

    def filled(self, updates=None):
        metric = self.make()
        for args, kwargs in self.updates if updates is None else updates:
            metric.update(*args, **kwargs)
        return metric


def assert_same(left, right, **tolerance):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key], **tolerance)
    else:
        torch.testing.assert_close(left, right, equal_nan=True, **tolerance)


def check_flags(case):
    metric = case.make()
    assert metric.higher_is_better in (True, False)
    assert metric.is_differentiable in (True, False)
    assert metric.full_state_update is False
    assert metric.target in ("high", "low", "retrained")


def check_clone_pickle_and_reset(case):
    metric = case.filled()
    value = metric.compute()
    unpickled = pickle.loads(pickle.dumps(metric))  # noqa: S301
    for copied in (metric.clone(), unpickled, copy.deepcopy(metric)):
        assert_same(copied.compute(), value)
        copied.reset()
        assert_same(metric.compute(), value)
    metric.reset()
    assert not metric.update_called
    for args, kwargs in case.updates:
        metric.update(*args, **kwargs)
    assert_same(metric.compute(), value)


def check_value_follows_updates(case):
    """A value that was computed in between is not served again after another update."""
    metric = case.make()
    for number, (args, kwargs) in enumerate(case.updates, start=1):
        metric.update(*args, **kwargs)
        try:
            between = metric.compute()
        except ValueError:
            continue  # too little data yet, which is a rule of some metrics
        assert_same(between, case.filled(case.updates[:number]).compute(), rtol=1e-12, atol=1e-12)
    assert_same(metric.compute(), case.filled().compute(), rtol=1e-12, atol=1e-12)


def check_merge(case):
    half = len(case.updates) // 2
    left, right = case.filled(case.updates[:half]), case.filled(case.updates[half:])
    left.merge_state(right)
    assert_same(left.compute(), case.filled().compute(), rtol=1e-6, atol=1e-12)


def check_forward(case):
    """Forward returns the batch's own value, none where it has none, and accumulates like update."""
    metric = case.make()
    for args, kwargs in case.updates:
        value = metric(*args, **kwargs)
        try:
            expected = case.filled([(args, kwargs)]).compute()
        except ValueError:
            # Too little data in one batch, which is a rule of some metrics: nothing, or a scalar that says so.
            expected = {} if isinstance(value, dict) else torch.full_like(value, torch.nan)
        assert_same(value, expected, rtol=1e-6, atol=1e-12)
    assert_same(metric.compute(), case.filled().compute(), rtol=1e-6, atol=1e-12)


def check_state_dict(case):
    """States travel in a checkpoint when asked, and not otherwise."""
    metric = case.filled()
    assert not metric.state_dict()
    metric.persistent(True)
    fresh = case.make()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    fresh._update_count = metric.update_count
    for mine, theirs in zip(fresh.modules(), metric.modules(), strict=True):
        if hasattr(theirs, "_update_count"):
            mine._update_count = theirs._update_count
    assert_same(fresh.compute(), metric.compute())


def check_device_and_dtype(case):
    metric = case.filled()
    value = metric.compute()
    assert_same(metric.to("cpu").half().double().float().compute(), value)
    moved = case.make().to("meta")
    assert moved.device == torch.device("meta")


def two_process_values(rank_of_update, cls, init, updates):
    """Run inside the pool: this rank's updates, then the value of the whole group."""
    rank = torch.distributed.get_rank()
    metric = cls(**init)
    for owner, (args, kwargs) in zip(rank_of_update, updates, strict=True):
        if owner == rank:
            metric.update(*args, **kwargs)
    value = metric.compute()
    # After the synchronised value each rank must be back on its own state, or a second round would count twice.
    metric._computed = None
    for part in metric.modules():
        if hasattr(part, "_computed"):
            part._computed = None
    return value, metric.compute()


def check_two_processes(case, pool):
    """Uneven shards, and one process with nothing at all."""
    expected = case.filled().compute()
    uneven = [0] + [1] * (len(case.updates) - 1)
    lopsided = [1] * len(case.updates)
    alternating = [number % 2 for number in range(len(case.updates))]
    for owners in (uneven, lopsided, alternating):
        for first, again in pool.run(two_process_values, owners, case.cls, case.init, case.updates):
            assert_same(first, expected, rtol=1e-6, atol=1e-12)
            assert_same(again, expected, rtol=1e-6, atol=1e-12)


def check_wide_states(case):
    """States in float64 hold the value, give or take what the usual ones round; counts survive the conversion."""
    metric = case.make()
    metric.set_dtype(torch.float64)
    for args, kwargs in case.updates:
        metric.update(*args, **kwargs)
    assert_same(metric.compute(), case.filled().compute(), rtol=1e-6, atol=1e-6, check_dtype=False)


def check_empty_batch(case):
    """A batch without samples, such as one of padding alone, changes nothing and is no error."""
    if not all(isinstance(item, torch.Tensor) for args, _ in case.updates for item in args):
        return  # a metric of models has no batches
    metric = case.filled()
    args, kwargs = case.updates[0]
    metric.update(*(item[:0] for item in args), **kwargs)
    assert_same(metric.compute(), case.filled().compute())


def check_plot(case):
    figure, axes = case.filled().plot()
    assert figure is not None
    assert axes.lines


CHECKS = [
    check_flags,
    check_clone_pickle_and_reset,
    check_value_follows_updates,
    check_merge,
    check_forward,
    check_state_dict,
    check_device_and_dtype,
    check_wide_states,
    check_empty_batch,
    check_plot,
]
