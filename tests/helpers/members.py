"""Tasks for `train_many`: small trainings that note when they begin, and a script that is killed while they run."""

import os
import random
import sys
import time
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lightning_unlearn.procedures.train_many import train_many
from tests.helpers.models import BoringClassifier, IdDataset, quiet_trainer


class Inline(Executor):
    """Runs what it is given at once; what is no `Exception` is not caught, as if the process were gone."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def note(log, member):
    """One line for one begun training; appended in one write, so that processes do not mix."""
    with open(log, "a") as stream:
        stream.write(f"{member} {os.getpid()}\n")


def noted(log):
    return [int(line.split()[0]) for line in Path(log).read_text().splitlines()] if Path(log).exists() else []


def train_net(member, log=None, broken=()):
    """A few steps of a network whose start and data are drawn from the global generators."""
    if log:
        note(log, member)
    if member in broken:
        raise ValueError(f"boom {member}")
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    return {"weights": net.state_dict(), "margins": torch.randn(5), "drawn": random.random(), "seed": member}


def train_module(member):
    """A real fit; tied weights and BatchNorm are in its state."""
    module = BoringClassifier()
    data = torch.utils.data.DataLoader(IdDataset(16, seed=member), batch_size=8)
    quiet_trainer(max_epochs=1).fit(module, data)
    return module


def train_slowly(member, log, gate):
    """Members from 3 on do not end before the gate is there."""
    result = train_net(member, log)
    while member >= 3 and not os.path.exists(gate):
        time.sleep(0.02)
    return result


def main(folder, log, gate):
    """What is killed: two workers of their own."""
    train_many(partial(train_slowly, log=log, gate=gate), range(6), folder=folder, workers=2, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
