"""An optional compiled pass of subtraction: positions are decoded and values added in one loop, bit for bit as numpy.

The extra `kernel` installs numba; without it numpy does the same work. Selection has no kernel: over numpy's own loops,
on pieces that stay in the cache, a fused loop that numba compiles gains too little.
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

__all__ = ["KERNEL_VARIABLE", "AddGaps", "KernelChoice", "load_add_gaps"]

log = logging.getLogger(__name__)

KERNEL_VARIABLE = "LIGHTNING_UNLEARN_KERNEL"
"""Environment variable with a `KernelChoice`, for processes in which no argument says otherwise."""

KernelChoice: TypeAlias = Literal["auto", "numpy", "numba"]
"""`"auto"` is numba where it can be had; `"numba"` is an error where it cannot."""

Int64s: TypeAlias = NDArray[np.int64]
AddGaps: TypeAlias = Callable[
    [NDArray[np.float64], NDArray[np.uint8], Int64s, NDArray[np.float32], Int64s, NDArray[np.float64]], bool
]
"""`(total, codes, code_offsets, values, value_offsets, factors) -> whether they fit`, see `load_add_gaps`."""

_BLOCK = 2**16  # entries of the sum, 512 KiB, that stay in the cache while all steps add to them


def _add_gaps(total: Any, codes: Any, code_offsets: Any, values: Any, value_offsets: Any, factors: Any) -> bool:
    # Indices are cast because a signed one may mean a place from the end, which costs a branch at every access.
    steps = factors.size
    places = np.full(steps, -1, np.int64)
    code_at = code_offsets[:steps].copy()
    value_at = value_offsets[:steps].copy()
    for start in range(0, total.size, _BLOCK):
        end = min(start + _BLOCK, total.size)
        for step in range(steps):
            place, code, value = places[step], code_at[step], value_at[step]
            last_code, last_value, factor = code_offsets[step + 1], value_offsets[step + 1], factors[step]
            while code < last_code:
                gap = np.int64(codes[np.uintp(code)])
                if gap == 255:
                    place += 255
                    code += 1
                    continue
                following = place + 1 + gap
                if following >= end:
                    break
                if value >= last_value:
                    return False
                total[np.uintp(following)] += factor * np.float64(values[np.uintp(value)])
                place = following
                code += 1
                value += 1
            places[step], code_at[step], value_at[step] = place, code, value
    for step in range(steps):
        if code_at[step] != code_offsets[step + 1] or value_at[step] != value_offsets[step + 1]:
            return False
    return True


@functools.cache
def _compile() -> AddGaps | Exception:
    """The compiled function, or why there is none: Python would look for a missing package at every call."""
    signature = "boolean(float64[::1], uint8[::1], int64[::1], float32[::1], int64[::1], float64[::1])"
    try:
        import numba

        try:
            compiled: AddGaps = numba.njit(signature, nogil=True, cache=True)(_add_gaps)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            compiled = numba.njit(signature, nogil=True)(_add_gaps)
    except Exception as error:  # whatever a compiler may raise on a platform that nobody has tried
        log.debug("Deltas are added by numpy: numba cannot be used (%r)", error)
        return error
    return compiled


def load_add_gaps(kernel: KernelChoice | None = None) -> AddGaps | None:
    """The compiled addition of one layer's `GAP8` code, or `None` where numpy is to do it.

    `add(total, codes, code_offsets, values, value_offsets, factors)` adds several steps' changes: the codes of step
    `i` are `codes[code_offsets[i]:code_offsets[i + 1]]`, its values likewise, each multiplied by `factors[i]`; products
    and sums are float64, and every entry of `total` gets them in the order of the steps. The sum is walked through in
    blocks that fit into the cache, by all steps together: that is what makes it faster than memory. `False`, with a
    part of them added, where a position is outside or there are more or fewer values than positions. It releases the
    GIL.

    The first call in a process imports and compiles: about a second, or a few tenths where a cache on disk is found.

    Args:
        kernel: What to use; `None` reads the environment variable, and is `"auto"` without it.

    Raises:
        ValueError: `kernel`, or the environment variable, is no `KernelChoice`.
        MissingRequirementError: `"numba"` is asked for, and it is missing or cannot compile.

    >>> load_add_gaps("numpy") is None
    True
    """
    name = "kernel" if kernel is not None else KERNEL_VARIABLE
    choice = kernel if kernel is not None else os.environ.get(KERNEL_VARIABLE, "auto")
    if check_choice(name, choice, ("auto", "numpy", "numba")) == "numpy":
        return None
    compiled = _compile()
    if not isinstance(compiled, Exception):
        return compiled
    if choice == "numba":
        remedy = "Install the extra `lightning-unlearn[kernel]`, or use 'auto'."
        raise MissingRequirementError(expected(name, "a kernel that works here", choice, remedy)) from compiled
    return None
