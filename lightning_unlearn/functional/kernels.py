"""An optional compiled pass of the selection: bit for bit what numpy computes, in one loop instead of six.

The extra `kernel` installs numba. Where it is missing, or cannot compile on a platform, the numpy passes do the same
work; a line in the debug log says so and nothing else. The environment variable `LIGHTNING_UNLEARN_KERNEL` chooses for
a whole process what an argument does not.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.checks import check_choice, expected

__all__ = ["KERNEL_VARIABLE", "Gather", "KernelChoice", "load_gather"]

log = logging.getLogger(__name__)

KERNEL_VARIABLE = "LIGHTNING_UNLEARN_KERNEL"
"""Environment variable with a `KernelChoice`, for processes in which no argument says otherwise."""

KernelChoice: TypeAlias = Literal["auto", "numpy", "numba"]
"""`"auto"` is numba where it can be had; `"numba"` is an error where it cannot."""

Float32s: TypeAlias = NDArray[np.float32]
Gather: TypeAlias = Callable[[Float32s, Float32s, int, int, NDArray[np.int32], Float32s], int]
"""`(after, before, start, floor, positions, values) -> count`, see `load_gather`."""

_SIGNATURE = "int64(float32[::1], float32[::1], int64, int32, int32[::1], float32[::1])"


def _gather(after: Any, before: Any, start: Any, floor: Any, positions: Any, values: Any) -> Any:
    """Branch-free, because at one hit in ten a branch is mispredicted far too often."""
    # A local counter from zero: the compiler then knows that no index is negative, and need not handle it.
    count: Any = 0
    below = np.int64(floor) - 1
    for index in range(after.size):
        positions[count] = start + index
        magnitude = np.float32(after[index] - before[index]).view(np.int32) & 0x7FFFFFFF
        count += (below - np.int64(magnitude)) >> 63 & 1
    # Storing values in the loop above makes it ten times slower whenever the two outputs lie alike in their pages.
    for place in range(count):
        index = positions[place] - start
        values[place] = after[index] - before[index]
    return count


@functools.cache
def _compile() -> Gather:
    import numba

    try:
        compiled: Gather = numba.njit(_SIGNATURE, nogil=True, cache=True)(_gather)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.njit(_SIGNATURE, nogil=True)(_gather)
    return compiled


def load_gather(kernel: KernelChoice | None = None) -> Gather | None:
    """The compiled pass over one piece of a layer, or `None` where numpy is to do it.

    `gather(after, before, start, floor, positions, values)` looks for the changes `after - before` (contiguous float32
    of one size) whose magnitude, read as an int32, is at least `floor`; it writes `start` + their place and their
    value, in order, and returns how many there are. The two outputs need room for as many entries as `after` has,
    because every entry is written before it is known whether it counts. The pass releases the GIL.

    The first call in a process imports and compiles: about a second, or a few tenths where a cache on disk is found.

    Args:
        kernel: What to use; `None` reads the environment variable, and is `"auto"` without it.

    Raises:
        ValueError: `kernel`, or the environment variable, is no `KernelChoice`.
        MissingRequirementError: `"numba"` is asked for, and it is missing or cannot compile.

    >>> load_gather("numpy") is None
    True
    """
    name = "kernel" if kernel is not None else KERNEL_VARIABLE
    choice = kernel if kernel is not None else os.environ.get(KERNEL_VARIABLE, "auto")
    if check_choice(name, choice, ("auto", "numpy", "numba")) == "numpy":
        return None
    try:
        return _compile()
    except Exception as error:  # whatever a compiler may raise on a platform that nobody has tried
        if choice == "numba":
            remedy = "Install the extra `lightning-unlearn[kernel]`, or use 'auto'."
            raise MissingRequirementError(expected(name, "a kernel that works here", choice, remedy)) from error
        log.debug("Changes are selected by numpy: numba cannot be used (%r)", error)
        return None
