"""The 8-bit floats of ONNX, E4M3FN and E5M2: rounding to them without any library's help.

Algebra. A type with m bits of mantissa, smallest normal exponent e_min and largest number M holds the multiples of

    u(x) = 2 ^ (max(floor(log2 |x|), e_min) - m)        around x,        up to M

so x' = clamp(u round(x / u), -M, M), half to even. Rounding up into the next binade is right by itself, since its
first number is a multiple of u too. Beyond M, infinities included, it saturates, as ONNX's QuantizeLinear does; NaN
stays NaN. Every x / u is exact in float64. (P. Micikevicius et al. 2022, FP8 Formats for Deep Learning, section 3.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Float8:
    """One of the types: bits of mantissa, exponent of the smallest normal number, largest finite number."""

    mantissa: int
    lowest_exponent: int
    max: float


FLOAT8 = {"float8e4m3fn": Float8(3, -6, 448.0), "float8e5m2": Float8(2, -14, 57344.0)}


def round_to_float8(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return the nearest numbers of `dtype` as float64, half to even, saturating. KeyError for another type."""
    kind = FLOAT8[dtype]
    wide = np.clip(np.asarray(x, dtype=np.float64), -kind.max, kind.max)
    exponent = np.maximum(np.frexp(wide)[1] - 1, kind.lowest_exponent)  # frexp's mantissa is in [1/2, 1)
    step = np.ldexp(1.0, exponent - kind.mantissa)
    return np.asarray(np.clip(np.rint(wide / step) * step, -kind.max, kind.max))
