"""Scales, zero points and integer weights.

Algebra. A real x is stored as the integer q with scale s and zero point z:

    q = clamp(round(x / s) + z, qmin, qmax)        x' = s (q - z)

asymmetric   s = (max - min) / (qmax - qmin),  z = round(qmin - min / s)
symmetric    s = max(|min|, |max|) / qmax,     z = 0
weights      symmetric per output channel c,   s_c = max |w_c| / weight_max
bias         int32 with scale s_x s_c and z = 0: the accumulator's own scale, so it is added as it stands

Rounding is half to even, as in ONNX QuantizeLinear. Every range is widened to hold 0, so that zero padding
and ReLU stay exact. A channel of zeros, or one so small that its bias would not fit into int32, takes the
smallest scale that still holds its bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..compiler.types import Range

LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767), "uint16": (0, 65535)}
#: Below this a float32 scale is denormal and the division in a kernel is no longer trustworthy.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor; `dtype` is the ONNX integer type's name in lower case."""

    scale: float
    zero_point: int
    dtype: str

    def __post_init__(self) -> None:
        low, high = LIMITS[self.dtype]
        if not (self.scale > 0 and np.isfinite(self.scale) and low <= self.zero_point <= high):
            raise ValueError(f"no valid quantization: {self}")

    @property
    def low(self) -> float:
        """The smallest real number that is represented."""
        return (LIMITS[self.dtype][0] - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest real number that is represented."""
        return (LIMITS[self.dtype][1] - self.zero_point) * self.scale


def activation_params(chosen: Range, dtype: str, symmetric: bool) -> QParams:
    """Return the scale and zero point that represent `chosen` (widened to hold 0) in `dtype`.

    ValueError for a symmetric unsigned type: it could hold no negative number.
    """
    if symmetric and dtype.startswith("u"):
        raise ValueError(f"symmetric {dtype} holds no negative number")
    low, high = min(chosen.min, 0.0), max(chosen.max, 0.0)
    qmin, qmax = LIMITS[dtype]
    if symmetric:
        scale = float(np.float32(max(-low, high) / qmax))
        return QParams(max(scale, SMALLEST_SCALE), 0, dtype)
    scale = max(float(np.float32((high - low) / (qmax - qmin))), SMALLEST_SCALE)
    zero_point = int(np.clip(np.rint(qmin - low / scale), qmin, qmax))
    return QParams(scale, zero_point, dtype)


def weight_scales(
    weight: np.ndarray, axis: int | None, weight_max: int, bias: np.ndarray | None, input_scale: float
) -> np.ndarray:
    """Return float32 scales of a weight: one per index of `axis`, or a single one where `axis` is None.

    `bias` (one float per output channel, or None) keeps every scale large enough for the int32 bias.
    """
    flat = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    largest = np.abs(flat).max(axis=1, initial=0.0).astype(np.float64)
    scales = largest / weight_max
    if bias is not None:
        needed = np.abs(bias.astype(np.float64)) / (input_scale * _INT32_MAX)
        scales = np.maximum(scales, needed.max(initial=0.0) if axis is None else needed)
    # a channel of zeros has nothing to represent: any scale does, one near the others keeps kernels happy
    typical = float(scales.max(initial=0.0)) or 1.0
    scales = np.where(scales > 0, scales, typical)
    return np.maximum(scales, SMALLEST_SCALE).astype(np.float32)


def quantize_weight(weight: np.ndarray, scales: np.ndarray, axis: int | None, weight_max: int) -> np.ndarray:
    """Return the int8 weight, symmetric, rounded to the nearest (half to even)."""
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    scaled = weight.astype(np.float64) / scales.astype(np.float64).reshape(shape)
    return np.clip(np.rint(scaled), -weight_max, weight_max).astype(np.int8)


def quantize_bias(bias: np.ndarray, scales: np.ndarray, input_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the int32 bias and its float32 scales, `input_scale * scales`, one per channel or a single one."""
    bias_scales = (np.float32(input_scale) * scales.astype(np.float32)).astype(np.float32)
    bias_scales = np.maximum(bias_scales, np.float32(SMALLEST_SCALE))
    integers = np.rint(bias.astype(np.float64) / bias_scales.astype(np.float64))
    return np.clip(integers, -_INT32_MAX, _INT32_MAX).astype(np.int32), bias_scales
