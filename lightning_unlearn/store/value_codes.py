"""How the values of a layer's kept entries become bytes, and back.

| dtype | bytes | error of a value `v` in a layer whose largest change is `m` |
|---|---|---|
| `float32` | 4 | none |
| `bfloat16` | 2 | at most `|v| / 2**8` |
| `scaled_float16` | 2 | at most `|v| / 2**10.99`, or `m / 2**24` where that is more |
| `int8` | 1 | at most half a step of `m / 127` (and `2**-15` of a step more: it is computed in float32) |

A power of two per layer brings the largest change of `scaled_float16` into (1/2, 1]: unscaled, small changes would be
flushed to zero. `int8` is rounded to the nearest step, ties to even.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_unlearn.types import ValueDtype
from lightning_unlearn.utilities.checks import expected

__all__ = ["VALUE_CODES", "VALUE_WIDTHS", "decode_values", "encode_values", "unscaled_values"]

Bytes: TypeAlias = npt.NDArray[np.uint8]

VALUE_CODES: tuple[ValueDtype, ...] = ("float32", "bfloat16", "scaled_float16", "int8")
"""Value dtypes in the order of the numbers that stand for them on disk."""

VALUE_WIDTHS: dict[ValueDtype, int] = {"float32": 4, "bfloat16": 2, "scaled_float16": 2, "int8": 1}
"""Bytes of one value."""

_FLOAT16_BELOW_TWO = 2.0 - 2.0**-10
_BFLOAT16_MAX = float(torch.finfo(torch.bfloat16).max)
_INT8_MAX = 127
_SERIAL = 32_767  # PyTorch shares out what is larger
_PLAIN = (2.0**-90, 2.0**90)  # factors that neither overflow nor meet subnormal numbers in float32


def _bytes(tensor: Tensor, dtype: str) -> Bytes:
    return tensor.numpy().astype(dtype, copy=False).view(np.uint8)  # copies only on a big-endian machine


def _times(values: Tensor, factor: float) -> Tensor:
    if _PLAIN[0] < factor < _PLAIN[1]:
        return values * factor
    return values.double() * factor


def _converted(values: Tensor, dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change(values)` in another dtype, in pieces too small for PyTorch to share them out.

    The work is a matter of microseconds, and threads that train, or load data, on the same cores would be waited for.
    """
    n = values.numel()
    if n <= _SERIAL:
        return change(values).to(dtype)
    converted = torch.empty(n, dtype=dtype)
    for start in range(0, n, _SERIAL):
        converted[start : start + _SERIAL] = change(values[start : start + _SERIAL])
    return converted


def encode_values(values: Tensor, value_dtype: ValueDtype) -> tuple[float, Bytes]:
    """Factor and bytes of values.

    Args:
        values: float32 of shape (k,), on the CPU and contiguous.
        value_dtype: How they are written.

    Raises:
        ValueError: a value is not finite.
    """
    largest = float(np.abs(values.numpy()).max(initial=0.0))
    if not math.isfinite(largest):
        raise ValueError(expected("values", "finite", largest, "Find out why the weights are not finite."))
    if value_dtype == "float32":
        return 1.0, _bytes(values, "<f4")
    if value_dtype == "bfloat16":
        narrow = values.clamp(-_BFLOAT16_MAX, _BFLOAT16_MAX) if largest > _BFLOAT16_MAX else values
        return 1.0, _bytes(_converted(narrow, torch.bfloat16, lambda piece: piece).view(torch.int16), "<i2")
    if largest == 0.0:
        return 1.0, np.zeros(VALUE_WIDTHS[value_dtype] * values.numel(), np.uint8)
    if value_dtype == "int8":
        scale = largest / _INT8_MAX
        return scale, _bytes(_converted(values, torch.int8, lambda piece: _times(piece, 1.0 / scale).round_()), "<i1")
    mantissa, exponent = math.frexp(largest)
    exponent = min(exponent - (mantissa == 0.5), 127)  # 2.0**exponent is the next power of two from `largest` on

    def scaled(piece: Tensor) -> Tensor:
        times = _times(piece, math.ldexp(1.0, -exponent))
        return times.clamp_(-_FLOAT16_BELOW_TWO, _FLOAT16_BELOW_TWO) if exponent == 127 else times

    return math.ldexp(1.0, exponent), _bytes(_converted(values, torch.float16, scaled), "<f2")


_TORCH: dict[ValueDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "scaled_float16": torch.float16,
    "int8": torch.int8,
}


def unscaled_values(value_dtype: ValueDtype, data: Bytes) -> Tensor:
    """The values behind the bytes before their factor is applied, in the dtype that they were written in.

    Args:
        value_dtype: How they were written.
        data: uint8 of shape (bytes,), contiguous, writable and not part of another array.

    Raises:
        ValueError: no whole number of values.
    """
    width = VALUE_WIDTHS[value_dtype]
    if data.size % width:
        raise ValueError(f"values of {width} bytes have {data.size} bytes")
    if sys.byteorder == "big":
        data = data.reshape(-1, width)[:, ::-1].copy().reshape(-1)
    return torch.from_numpy(data).view(_TORCH[value_dtype])


def decode_values(value_dtype: ValueDtype, scale: float, data: Bytes, kept: int) -> npt.NDArray[np.float32]:
    """The values behind the bytes, float32 of shape (kept,).

    Raises:
        ValueError: there are not as many bytes as `kept` values need.
    """
    width = VALUE_WIDTHS[value_dtype]
    if data.size != width * kept:
        raise ValueError(f"{kept} values of {width} bytes have {data.size} bytes")
    aligned = data.copy()  # the bytes may lie anywhere in a payload, and must not be written to there
    if value_dtype == "float32":
        return aligned.view("<f4").astype(np.float32, copy=False)
    if value_dtype == "bfloat16":
        return (aligned.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if value_dtype == "int8":
        steps = np.maximum(np.arange(-128, 128), -_INT8_MAX) * scale  # -128 is never written, and might overflow
        table: npt.NDArray[np.float32] = steps.astype(np.float32)
        return np.take(table, aligned ^ np.uint8(128))
    halves = torch.from_numpy(aligned.view("<f2").astype(np.float16, copy=False))  # torch converts 8 times faster
    values: npt.NDArray[np.float32] = halves.to(torch.float32).mul_(scale).numpy()
    return values
