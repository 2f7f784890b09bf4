"""Scales, zero points, and weights of few bits.

Algebra. A real x is stored as the integer q with scale s and zero point z:

    q = clamp(round(x / s) + z, qmin, qmax)        x' = s (q - z)

asymmetric   s = (max - min) / (qmax - qmin),  z = round(qmin - min / s)
symmetric    s = max(|min|, |max|) / qmax,     z = 0
8-bit floats s = max(|min|, |max|) / M,        z = 0, and q is the nearest number of the type (M: its largest)
weights      symmetric,  s_c = max |w_c| / weight_max  over an output channel c, or over a block of its inputs
bias         int32 with scale s_x s_c and z = 0: the accumulator's own scale, so it is added as it stands

Rounding is half to even, as in ONNX QuantizeLinear. Every range is widened to hold 0, so that zero padding
and ReLU stay exact. A channel of zeros, or one so small that its bias would not fit into int32, takes the
smallest scale that still holds its bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .float8 import FLOAT8

if TYPE_CHECKING:
    from ..compiler.types import QuantScheme, Range

LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767), "uint16": (0, 65535)}
#: Below this a float32 scale is denormal and the division in a kernel is no longer trustworthy.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_INT32_MAX = 2**31 - 1

#: Per-channel DequantizeLinear, and the integer forms of Pad and MaxPool; then the opset that brought each type.
BASE_OPSET, BLOCK_OPSET = 13, 21
_TYPE_OPSET = {**dict.fromkeys(FLOAT8, 19), **dict.fromkeys(("int4", "int16", "uint16"), 21)}


def needed_opset(scheme: QuantScheme, dtypes: Iterable[str] = ()) -> int:
    """Return the lowest opset that has Q/DQ for the scheme, and for weights of the further ONNX types `dtypes`."""
    types = [scheme.activation or "", scheme.weight, *dtypes]
    return max(BASE_OPSET, BLOCK_OPSET if scheme.block else 0, *(_TYPE_OPSET.get(t, 0) for t in types))


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor; `dtype` is the ONNX type's name in lower case."""

    scale: float
    zero_point: int
    dtype: str

    def __post_init__(self) -> None:
        low, high = _limits(self.dtype)
        if not (self.scale > 0 and np.isfinite(self.scale) and low <= self.zero_point <= high):
            raise ValueError(f"no valid quantization: {self}")

    @property
    def low(self) -> float:
        """The smallest real number that is represented."""
        return (_limits(self.dtype)[0] - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest real number that is represented."""
        return (_limits(self.dtype)[1] - self.zero_point) * self.scale


def _limits(dtype: str) -> tuple[float, float]:
    return (-FLOAT8[dtype].max, FLOAT8[dtype].max) if dtype in FLOAT8 else LIMITS[dtype]


def activation_params(chosen: Range, dtype: str, symmetric: bool) -> QParams:
    """Return the scale and zero point that represent `chosen` (widened to hold 0) in `dtype`; 8-bit floats have none.

    ValueError for a symmetric unsigned type: it could hold no negative number.
    """
    if symmetric and dtype.startswith("u"):
        raise ValueError(f"symmetric {dtype} holds no negative number")
    low, high = min(chosen.min, 0.0), max(chosen.max, 0.0)
    qmin, qmax = _limits(dtype)
    if symmetric or dtype in FLOAT8:
        scale = float(np.float32(max(-low, high) / qmax))
        return QParams(max(scale, SMALLEST_SCALE), 0, dtype)
    scale = max(float(np.float32((high - low) / (qmax - qmin))), SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(qmin - low / scale), qmin, qmax))
    return QParams(scale, zero_point, dtype)


def weight_scales(
    weight: np.ndarray,
    axis: int | None,
    weight_max: float,
    bias: np.ndarray | None,
    input_scale: float,
    block: int | None = None,
) -> np.ndarray:
    """Return float32 scales of a weight: one per index of `axis`, or a single one (shape (1,)) where `axis` is None.

    With `block`, which must divide the weight along `axis`, one scale for each block of so many weights along `axis`:
    the weight's shape with that axis divided. `bias` (one float per output channel, or None; not with `block`) keeps
    every scale large enough for the int32 bias.
    """
    largest = _largest(weight, axis, block).astype(np.float64)
    scales = largest / weight_max
    if bias is not None:
        scales = np.maximum(scales, needed_for_bias(bias, input_scale, per_channel=axis is not None))
    # a channel of zeros has nothing to represent: any scale does, one near the others keeps kernels happy
    typical = float(scales.max(initial=0.0)) or 1.0
    scales = np.where(scales > 0, scales, typical)
    return np.maximum(scales, SMALLEST_SCALE).astype(np.float32)


def needed_for_bias(bias: np.ndarray, input_scale: float, *, per_channel: bool) -> np.ndarray:
    """Return the smallest weight scales with which the bias fits into int32: one a channel, or one for all."""
    needed = np.asarray(np.abs(bias.astype(np.float64)) / (input_scale * _INT32_MAX))
    return needed if per_channel else np.atleast_1d(needed.max(initial=0.0))


def _largest(weight: np.ndarray, axis: int | None, block: int | None) -> np.ndarray:
    """Return the largest magnitude of whatever shares a scale."""
    magnitude = np.abs(weight)
    if axis is None:
        return np.atleast_1d(magnitude.max(initial=0.0))
    if block is None:
        return np.asarray(np.moveaxis(magnitude, axis, 0).reshape(weight.shape[axis], -1).max(axis=1, initial=0.0))
    shape = weight.shape
    blocks = magnitude.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
    return np.asarray(blocks.max(axis=axis + 1, initial=0.0))


def spread(scales: np.ndarray, rank: int, axis: int | None, block: int | None = None) -> np.ndarray:
    """Return the scales in a shape that broadcasts to a weight of `rank` dimensions."""
    if block is not None and axis is not None:
        return np.repeat(scales, block, axis)
    shape = [1] * rank
    if axis is not None:
        shape[axis] = -1
    return scales.reshape(shape)


def quantize_weight(
    weight: np.ndarray, scales: np.ndarray, axis: int | None, weight_max: int, block: int | None = None
) -> np.ndarray:
    """Return the weight as integers (int8), symmetric, rounded to the nearest (half to even)."""
    scaled = weight.astype(np.float64) / spread(scales.astype(np.float64), weight.ndim, axis, block)
    return np.asarray(np.clip(np.rint(scaled), -weight_max, weight_max).astype(np.int8))


def quantize_bias(bias: np.ndarray, scales: np.ndarray, input_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the int32 bias and its float32 scales, `input_scale * scales`, one per channel or a single one."""
    bias_scales = (np.float32(input_scale) * scales.astype(np.float32)).astype(np.float32)
    bias_scales = np.maximum(bias_scales, np.float32(SMALLEST_SCALE))
    integers = np.rint(bias.astype(np.float64) / bias_scales.astype(np.float64))
    return np.clip(integers, -_INT32_MAX, _INT32_MAX).astype(np.int32), bias_scales
