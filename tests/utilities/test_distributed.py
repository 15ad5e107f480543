import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_unlearn.exceptions import LightningUnlearnError, StoreMismatchError
from lightning_unlearn.utilities.distributed import (
    gather,
    on_every_process,
    on_every_rank,
    on_first_process,
    on_rank_zero,
    share_out,
)
from tests.helpers.models import quiet_trainer


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 5))
def test_shares_are_complete_and_fair(sizes, n_ranks):
    owners = share_out(sizes, n_ranks)
    assert len(owners) == len(sizes)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(n_ranks)]
    assert sum(loads) == sum(sizes)
    assert max(loads) <= sum(sizes) / n_ranks + max(sizes, default=0)


def calls(kind):
    strategy = quiet_trainer(strategy="ddp", devices=2).strategy
    strategy.setup_environment()
    done = []

    def function():
        done.append(strategy.global_rank)
        if kind == "ours":
            raise StoreMismatchError("not this one")
        if kind == "other":
            raise OSError("disk")
        return {"n": 3}

    try:
        result = on_rank_zero(strategy, function)
    except Exception as error:
        return done, type(error), str(error)
    return done, None, result


def test_rank_zero_works_for_all_of_them(gloo_pool):
    assert gloo_pool.run(calls, "fine") == [([0], None, {"n": 3}), ([], None, {"n": 3})]
    assert gloo_pool.run(calls, "ours") == [
        ([0], StoreMismatchError, "not this one"),
        ([], StoreMismatchError, "not this one"),
    ]
    first, second = gloo_pool.run(calls, "other")
    assert first == ([0], OSError, "disk")
    assert second[1] is LightningUnlearnError
    assert "disk" in second[2]


def test_on_one_device_it_is_a_plain_call():
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    assert on_rank_zero(strategy, lambda: 5) == 5
    with pytest.raises(OSError, match="disk"):
        on_rank_zero(strategy, lambda: (_ for _ in ()).throw(OSError("disk")))


def together(failing):
    """What a rank gathers, and what comes of a function that fails on some ranks with errors of either kind."""
    strategy = quiet_trainer(strategy="ddp", devices=2).strategy
    strategy.setup_environment()
    rank = strategy.global_rank

    def function():
        if rank in failing:
            raise failing[rank](f"of {rank}")
        return rank

    try:
        return gather(strategy, {"rank": rank}), on_every_rank(strategy, function)
    except Exception as error:
        return type(error), str(error)


def test_ranks_gather_and_fail_together(gloo_pool):
    everyone = [{"rank": 0}, {"rank": 1}]
    assert gloo_pool.run(together, {}) == [(everyone, 0), (everyone, 1)]
    assert gloo_pool.run(together, {1: StoreMismatchError}) == [(StoreMismatchError, "of 1")] * 2
    assert gloo_pool.run(together, {0: StoreMismatchError, 1: StoreMismatchError}) == [(StoreMismatchError, "of 0")] * 2
    other, own = gloo_pool.run(together, {1: OSError})
    assert own == (OSError, "of 1")
    assert other == (LightningUnlearnError, "Rank 1 failed: OSError('of 1')")


def test_on_one_device_nobody_else_is_asked():
    strategy = SingleDeviceStrategy(torch.device("cpu"))
    assert gather(strategy, 5) == [5]
    assert on_every_rank(strategy, lambda: 5) == 5
    with pytest.raises(OSError, match="disk"):
        on_every_rank(strategy, lambda: (_ for _ in ()).throw(OSError("disk")))


def failing(rank, kind, everywhere):
    def work():
        if dist.get_rank() == rank:
            raise kind("no disk")
        return dist.get_rank()

    try:
        return (on_every_process if everywhere else on_first_process)(work)
    except Exception as error:
        return type(error).__name__, str(error)


def test_the_first_process_answers_for_all_or_fails_for_all(gloo_pool):
    assert gloo_pool.run(failing, 1, ValueError, False) == [0, 0]
    assert gloo_pool.run(failing, 0, StoreMismatchError, False) == [("StoreMismatchError", "no disk")] * 2
    zero, one = gloo_pool.run(failing, 0, ValueError, False)
    assert zero == ("ValueError", "no disk")
    assert one == ("LightningUnlearnError", "Rank 0 failed: ValueError('no disk')")


def test_what_fails_on_one_process_stops_all(gloo_pool):
    assert gloo_pool.run(failing, 7, ValueError, True) == [0, 1]
    zero, one = gloo_pool.run(failing, 1, ValueError, True)
    assert zero[0] == "LightningUnlearnError"
    assert zero[1] == "Rank 1 failed: ValueError('no disk')"
    assert one == ("ValueError", "no disk")
