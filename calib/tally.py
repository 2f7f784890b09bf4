"""What a sweep knows of each tensor so far: of the images of one condition, in a size that does not depend on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..compiler.types import TensorStatistics
from .augment import Augmented
from .histogram import Histogram

#: Samples are kept until there are so many bytes of them, and are then counted all at once.
_BUFFER_BYTES = 1 << 23


@dataclass(eq=False)
class Gathered:
    """What is known of one tensor."""

    low: float = math.inf
    high: float = -math.inf
    elements: int = 0
    histogram: Histogram = field(default_factory=Histogram)

    @property
    def seen(self) -> bool:
        """Whether anything is known at all."""
        return self.low <= self.high

    def widen(self, low: float, high: float) -> None:
        """Take note of two elements."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, elements: int, samples: np.ndarray, extremes: np.ndarray) -> None:
        """Count samples of so many elements, and known extremes (both float32); `widen` comes first."""
        self.elements += elements
        self.histogram.cover(self.low, self.high)
        self.histogram.add(samples, extremes)

    def statistics(self, images: int) -> TensorStatistics:
        """Return what is known after so many images."""
        h = self.histogram
        if not h.counts.any():
            return TensorStatistics(self.low, self.high, images)
        return TensorStatistics(self.low, self.high, images, h.estimate(self.elements), h.low, h.high)


class Tally:
    """Folds the runs of one augmented model into `gathered`, tensor by tensor. All of it is there after `settle`."""

    def __init__(self, augmented: Augmented, gathered: Mapping[str, Gathered], samples: int) -> None:
        self._augmented, self._gathered, self._samples = augmented, gathered, samples
        self._least = np.full(augmented.extremes, np.inf, np.float32)
        self._most = -self._least
        self._buffer: list[np.ndarray] = []

    def matrix(self, matrix: np.ndarray, count: int) -> None:
        """Fold in a run's statistics (rows, columns) of `count` images; rows that pad repeat others."""
        extremes = self._augmented.extremes
        np.minimum(self._least, matrix[:, :extremes].min(axis=0), out=self._least)
        np.maximum(self._most, matrix[:, :extremes].max(axis=0), out=self._most)
        if self._samples:
            self._buffer.append(matrix[:count])
            if sum(array.nbytes for array in self._buffer) >= _BUFFER_BYTES:
                self.settle()

    def whole(self, name: str, array: np.ndarray, count: int, rng: np.random.Generator) -> bool:
        """Fold in a tensor that is here with all its elements, of `count` images; return whether it is finite."""
        low, high = float(array.min()), float(array.max())
        if not math.isfinite(low) or not math.isfinite(high):  # NumPy, unlike ONNX Runtime, passes NaN on
            return False
        tensor = self._gathered[name]
        tensor.widen(low, high)
        if self._samples:
            wanted = self._samples * count
            values = array.ravel()
            picked = values if values.size <= wanted else values[draw(rng, values.size, wanted)]
            extremes = np.array([low, high] if values.size > 1 else [low], np.float32)
            tensor.count(values.size, picked.astype(np.float32, copy=False), extremes)
        return True

    def settle(self) -> None:
        """Hand on the extremes so far, and count the samples kept so far."""
        for t in self._augmented.tensors:
            low = min(self._least[t.lows].min(initial=np.inf), 0.0 if t.bounded else np.inf)
            self._gathered[t.name].widen(float(low), float(self._most[t.highs].max()))
        if self._buffer:
            rows = np.concatenate(self._buffer)
            self._buffer.clear()
            for t in self._augmented.tensors:
                self._gathered[t.name].count(t.each * len(rows), rows[:, t.samples], rows[:, t.extremes])


def draw(rng: np.random.Generator, places: int, wanted: int) -> np.ndarray:
    """Return `wanted` places out of 0 .. `places` - 1, in order: one at random in each of as many equal stretches."""
    return ((np.arange(wanted) + rng.random(wanted)) * (places / wanted)).astype(np.int64)
