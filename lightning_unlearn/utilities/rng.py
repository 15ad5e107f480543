"""The state of every random number generator that a training draws from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RngState", "capture_rng", "seed_generators", "seed_of", "seeded_generators"]


@dataclass(frozen=True, slots=True)
class RngState:
    """States of the global generators of Python, NumPy and torch, made by `capture_rng`.

    Attributes:
        python: What `random.getstate` returned.
        numpy: What `numpy.random.get_state` returned, as a dictionary.
        torch: State of torch's generator on the CPU, uint8.
        cuda: State of every CUDA device's generator, in order; none where CUDA was not in use.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: tuple[Tensor, ...] = ()

    def restore(self) -> None:
        """Make these the states of the generators; of devices that both know.

        >>> state = capture_rng()
        >>> first = random.random(), np.random.rand(), torch.rand(1)
        >>> state.restore()
        >>> (random.random(), np.random.rand(), torch.rand(1)) == first
        True
        """
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_available():
            for device, state in enumerate(self.cuda[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)


def capture_rng() -> RngState:
    """The states as they are now; drawing goes on undisturbed."""
    # Asking for the state would initialise CUDA, which nobody has drawn from yet.
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return RngState(
        random.getstate(),
        dict(np.random.get_state(legacy=False)),  # noqa: NPY002
        torch.get_rng_state(),
        tuple(torch.cuda.get_rng_state_all()) if in_use else (),
    )


def seed_of(*parts: Any) -> int:
    """A seed of 32 bits from several values, the same in every process.

    >>> seed_of(0, "order", 1) == seed_of(0, "order", 1) != seed_of(0, "order", 2)
    True
    """
    return int(hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()[:8], 16)


def seed_generators(*parts: Any, devices: bool = True) -> None:
    """Seed the global generators of Python, NumPy and torch with `seed_of(*parts)`.

    Args:
        parts: What the seed is made of.
        devices: Also those of every other device than the CPU, which takes ten times as long.
    """
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded_generators(*parts: Any) -> Iterator[None]:
    """The global generators seeded inside, and as they were outside, also after an exception.

    >>> with seeded_generators(0, "first"):
    ...     number = random.random()
    >>> with seeded_generators(0, "first"):
    ...     number == random.random()
    True
    """
    state = capture_rng()
    try:
        seed_generators(*parts)
        yield
    finally:
        state.restore()
