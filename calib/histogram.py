"""A histogram whose range grows while it is filled, so that one sweep suffices and its size stays the same.

n equal bins lie over [low, high], which always holds 0. A value outside makes the range double towards it until it
fits: with width w = high - low, upwards to [low, low + 2w], downwards to [high - 2w, high]. Bins are then merged in
pairs,

    upwards:    c'[i] = c[2i] + c[2i+1]          for i < n/2,     0 above
    downwards:  c'[n/2 + i] = c[2i] + c[2i+1]    for i < n/2,     0 below

which is what counting in the wider bins from the start would have given, up to values on an edge between two bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

#: Bins of a histogram. The data fills at least a quarter of them: four bins for each of 255 steps.
BINS = 4096
#: Below this width all values count as 0 (4096 / width must be a float32).
_TINY = 1e-30


@dataclass(eq=False)
class Histogram:
    """Counts (int64) in equal bins over [low, high]."""

    low: float = 0.0
    high: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def cover(self, low: float, high: float) -> None:
        """Widen the range until it holds [low, high], which must be finite."""
        if self.high - self.low < _TINY:
            zeros = self.counts.sum()
            self.low, self.high = min(low, 0.0), max(high, 0.0)
            self.counts[:] = 0
            self.counts[self._bins(np.zeros(1, np.float32))] = zeros
        while high > self.high or low < self.low:
            self._double(upwards=high > self.high)

    def _double(self, upwards: bool) -> None:
        width = self.high - self.low
        pairs = self.counts.reshape(-1, 2).sum(axis=1)
        empty = np.zeros_like(pairs)
        self.counts = np.concatenate([pairs, empty] if upwards else [empty, pairs])
        if upwards:
            self.high = self.low + 2 * width
        else:
            self.low = self.high - 2 * width

    def add(self, values: np.ndarray) -> None:
        """Count the values (float32, any shape), which must lie in the range."""
        self.counts += np.bincount(self._bins(values.ravel()), minlength=len(self.counts))

    def _bins(self, values: np.ndarray) -> np.ndarray:
        """Return the bin of each value; in float32, which is off by one bin at most."""
        width, count = self.high - self.low, len(self.counts)
        if width < _TINY:
            return np.zeros(values.shape, np.intp)
        position = values * np.float32(count / width)
        if self.low:
            position -= np.float32(self.low * count / width)
        np.minimum(position, np.float32(count - 1), out=position)
        return position.astype(np.intp)
