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
    """Two rows of counts (int64) in the same equal bins over [low, high]: of samples, and of known extremes.

    A tensor of N elements was sampled n times, so a bin with c samples holds about c N/n elements. In the tails, where
    there are few samples or none, something better is known: the extremes of its slices are all elements of it, so a
    bin holds at least as many elements as it holds such extremes. `estimate` is the larger of the two.
    """

    low: float = 0.0
    high: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros((2, BINS), np.int64))

    def cover(self, low: float, high: float) -> None:
        """Widen the range until it holds [low, high], which must be finite."""
        if self.high - self.low < _TINY:
            zeros = self.counts.sum(axis=1)
            self.low, self.high = min(low, 0.0), max(high, 0.0)
            self.counts[:] = 0
            self.counts[:, self._bins(np.zeros(1, np.float32))[0]] = zeros
        while high > self.high or low < self.low:
            self._double(upwards=high > self.high)

    def _double(self, upwards: bool) -> None:
        width = self.high - self.low
        pairs = self.counts.reshape(2, -1, 2).sum(axis=2)
        empty = np.zeros_like(pairs)
        self.counts = np.concatenate([pairs, empty] if upwards else [empty, pairs], axis=1)
        if upwards:
            self.high = self.low + 2 * width
        else:
            self.low = self.high - 2 * width

    def add(self, samples: np.ndarray, extremes: np.ndarray) -> None:
        """Count values (float32, any shapes), which must lie in the range."""
        for row, values in zip(self.counts, (samples, extremes), strict=True):
            row += np.bincount(self._bins(values.ravel()), minlength=BINS)

    def estimate(self, elements: int) -> np.ndarray:
        """Return about how many of the tensor's `elements` lie in each bin (int64)."""
        samples, extremes = self.counts
        found: np.ndarray = np.maximum(samples * max(1, round(elements / max(samples.sum(), 1))), extremes)
        return found

    def _bins(self, values: np.ndarray) -> np.ndarray:
        """Return the bin of each value; in float32, which is off by one bin at most."""
        width = self.high - self.low
        if width < _TINY:
            return np.zeros(values.shape, np.intp)
        position = values * np.float32(BINS / width)
        if self.low:
            position -= np.float32(self.low * BINS / width)
        np.minimum(position, np.float32(BINS - 1), out=position)
        return position.astype(np.intp)
