"""Requantization without floats: a multiplication of integers and a shift, after HAWQ-v3.

A sum a of a layer with the scales s, t_o (integers.py) becomes the next Q's q = clip(z_y + round(a M_o)), where
M_o = s t_o / s_y. With M_o = m_o 2^-n_o to 31 bits, m_o in [2^30, 2^31), in 64-bit integers:

    q = clip(z_y + floor((a m_o + 2^(n_o - 1)) / 2^n_o))

that is, ties are rounded up. The bias is rounded to a whole number of s t_o and joins the sum; one that is 2^31 or
more (a channel that is next to nothing) is left to floats. |a m| < 2^63. A ReLU between the layer and Q cannot go
below z_y. Source: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", 2021; the rounding is that of gemmlowp's
and TFLite's reference, but once instead of twice.
"""

from __future__ import annotations

import numpy as np

_BITS = 31
#: The largest bias, in steps of the sum: with a sum of 32 bits times 31 bits, 64 are enough.
LARGEST = 2**31
#: Shifts that 64-bit integers can do; factors are between 2^-31 and 2^30 then.
_LEAST, _MOST = 1, 62


def dyadic(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return m and n, int64, with factors = m 2^-n to 31 bits; None where a factor is too large or too small."""
    fraction, exponent = np.frexp(np.asarray(factors, np.float64))
    m = np.rint(np.ldexp(fraction, _BITS)).astype(np.int64)
    n = _BITS - exponent.astype(np.int64)
    carried = m == 1 << _BITS
    m, n = np.where(carried, m >> 1, m), np.where(carried, n - 1, n)
    fits = (factors > 0).all() and (n >= _LEAST).all() and (n <= _MOST).all()
    return (m, n) if fits else None


def requantized(sums: np.ndarray, m: np.ndarray, n: np.ndarray, zero: int, low: int, high: int) -> np.ndarray:
    """Return q for sums, what the module computes, in numpy: m and n are broadcast against the sums."""
    rounded = (sums.astype(np.int64) * m + (np.int64(1) << (n - 1))) >> n
    return np.asarray(np.clip(rounded + zero, low, high))
