"""How compiled kernels are chosen. The extra `kernel` installs numba; without it numpy does the same work.

Selection has no kernel: numpy's own loops, on pieces that stay in the cache, were measured to be within a fifth of a
fused loop that numba compiles.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["KERNEL_VARIABLE", "KernelChoice"]

KERNEL_VARIABLE = "LIGHTNING_UNLEARN_KERNEL"
"""Environment variable with a `KernelChoice`, for processes in which no argument says otherwise."""

KernelChoice: TypeAlias = Literal["auto", "numpy", "numba"]
"""`"auto"` is numba where it can be had; `"numba"` is an error where it cannot."""
