"""Context managers that look at a module and leave it as it was: train/eval flags, `requires_grad`, buffers, RNG."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["evaluating", "isolated_rng", "preserved_buffers", "preserved_modes", "preserved_requires_grad"]


@contextmanager
def preserved_modes(module: nn.Module) -> Iterator[None]:
    """Restore the train/eval flag of every submodule on exit, also after an exception.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with preserved_modes(net):
    ...     _ = net.eval()
    >>> [child.training for child in net]
    [True, False]
    """
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        yield
    finally:
        # A `train` of the user's may do more than set flags (adapters merge their weights in eval mode, and take them
        # out again); parents come before children, so what they push down is put right.
        for submodule, training in flags:
            if submodule.training != training and type(submodule).train is not nn.Module.train:
                submodule.train(training)
        # Else the flag is written directly: `train()` would push the parent's value down to children that differ.
        for submodule, training in flags:
            submodule.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode afterwards; and parameters are in pieces again under FSDP2.

    >>> net = nn.Linear(1, 1)
    >>> with evaluating(net):
    ...     net.training
    False
    >>> net.training
    True
    """
    with preserved_modes(module):
        module.eval()
        try:
            yield
        finally:
            # The outermost keeps its parameters whole after a forward pass, for a backward pass that does not come.
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()


@contextmanager
def preserved_requires_grad(module: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of every parameter on exit, also after an exception.

    >>> net = nn.Linear(1, 1)
    >>> with preserved_requires_grad(net):
    ...     _ = net.requires_grad_(False)
    >>> net.weight.requires_grad
    True
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Restore every buffer on exit, also after an exception: the same tensors, with the same values.

    >>> net = nn.BatchNorm1d(2)
    >>> with preserved_buffers(net):
    ...     _ = net(torch.randn(4, 2))
    >>> int(net.num_batches_tracked)
    0
    """
    values = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    # A layer may assign a new tensor to the name of its buffer.
    named = [(submodule, dict(submodule._buffers)) for submodule in module.modules()]
    try:
        yield
    finally:
        for submodule, buffers in named:
            submodule._buffers.clear()
            submodule._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (every CUDA device) on exit, also after an exception.

    Args:
        seed: Seeds torch inside; `None` keeps the current state.

    >>> before = torch.get_rng_state()
    >>> with isolated_rng(seed=1):
    ...     _ = torch.rand(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
