"""The pool itself: it really is two processes, and it never hides a failure."""

import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything

from tests.helpers.distributed import ChildError, GlooPool
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer


def summed(value):
    total = torch.tensor(float(value[dist.get_rank()]))
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), dist.get_world_size(), float(total)


def fails_on(rank):
    if dist.get_rank() == rank:
        raise RuntimeError("deliberately wrong")


def fails_everywhere():
    raise RuntimeError("wrong on both")


def trains():
    seed_everything(1, verbose=False)
    module = BoringClassifier()
    trainer = quiet_trainer(strategy="ddp", devices=2, max_epochs=1)
    trainer.fit(module, loader(IdDataset(16), batch_size=4))
    return (
        trainer.world_size,
        sorted(index for batch in module.seen for index in batch),
        module.net.head.weight.detach().clone(),
    )


def test_two_processes_compute_together(gloo_pool):
    (pid0, *first), (pid1, *second) = gloo_pool.run(summed, [1, 2])
    assert len({pid0, pid1, os.getpid()}) == 3
    assert (first, second) == ([0, 2, 3.0], [1, 2, 3.0])


def test_a_failure_on_both_ranks_is_raised_and_the_pool_stays(gloo_pool):
    with pytest.raises(ChildError, match="wrong on both"):
        gloo_pool.run(fails_everywhere)
    assert gloo_pool.is_alive
    assert gloo_pool.run(summed, [1, 2])[0][3] == 3.0


def test_a_real_trainer_runs_inside(gloo_pool):
    (world, seen0, weight0), (_, seen1, weight1) = gloo_pool.run(trains)
    assert world == 2
    assert sorted(seen0 + seen1) == list(range(16))
    assert torch.equal(weight0, weight1)


@pytest.mark.slow
def test_a_failure_on_one_rank_ends_the_pool():
    pool = GlooPool()
    with pytest.raises(ChildError, match=r"rank 1:(.|\n)*deliberately wrong"):
        pool.run(fails_on, 1)
    assert not pool.is_alive
