"""The sums over the rows that a linear layer reads and gives, which rounding and low rank need.

    X'X and Y'X     about the means of X and Y where the layer's bias takes care of the mean; else as they are

Of layers with too many inputs for that, the rows themselves are kept, if that is asked for (passes/metric.py).

Shapes: X (groups, rows, in), Y (groups, rows, out), weights (groups, out, in), as layout.py has them. Sums are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from ...passes import metric
from ...passes.forgiving import Rows
from ...passes.metric import Metric
from .layout import Layout


class Sums(ABC):
    """What is known of the rows of one layer, which come batch after batch. `energy` is that of Y."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.rows, self.energy = layout, 0, 0.0

    @abstractmethod
    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows: x (groups, rows, in) of what is read, y (groups, rows, out) of what shall come out."""

    @abstractmethod
    def shift(self, weight: np.ndarray) -> np.ndarray:
        """Return what a bias lacks with this weight (groups, out, in): one number per output channel."""

    @abstractmethod
    def owed(self, weight: np.ndarray) -> np.ndarray:
        """Return (Y - X V')'X of a weight V (groups, out, in), of the same shape."""

    @abstractmethod
    def lost(self, error: np.ndarray) -> float:
        """Return the energy of X D' of an error D (groups, out, in) of the weight."""

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """Return the norm of each group's weight that these rows stand for (passes/metric.py)."""

    @abstractmethod
    def as_they_are(self) -> list[Metric]:
        """Return X'X of each group, not shrunk: what these rows alone say."""


def sums(layout: Layout, rows: int) -> Sums:
    """Return what so many rows of a layer are added to.

    Of a wide layer the rows themselves are kept; and of a matrix that has fewer rows than inputs, whose only form of
    low rank takes no Gram matrix.
    """
    few = layout.is_matrix and 2 * rows < layout.inputs
    return FewMoments(layout) if few or layout.wide else Moments(layout)


def judging(layout: Layout, rows: int) -> Sums:
    """Return what so many rows of a layer are added to that errors are measured on."""
    return FewMoments(layout) if 2 * rows < layout.inputs or layout.wide else Moments(layout)


class Moments(Sums):
    """Sums over the rows."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        outputs = math.prod(layout.shape) // (layout.inputs * layout.groups)
        self._gram = np.zeros((layout.groups, layout.inputs, layout.inputs))
        self._cross = np.zeros((layout.groups, outputs, layout.inputs))
        self._x, self._y = np.zeros((layout.groups, layout.inputs)), np.zeros((layout.groups, outputs))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows (groups, rows, in) and (groups, rows, out)."""
        self.rows += x.shape[1]
        self._gram += x.swapaxes(1, 2) @ x
        self._cross += y.swapaxes(1, 2) @ x
        self._x += x.sum(axis=1)
        self._y += y.sum(axis=1)
        self.energy += float(np.vdot(y, y))

    def less(self, part: Moments) -> Moments:
        """Return the sums over all rows but those of `part`."""
        rest = Moments(self.layout)
        rest.rows, rest.energy = self.rows - part.rows, self.energy - part.energy
        rest._gram, rest._cross = self._gram - part._gram, self._cross - part._cross
        rest._x, rest._y = self._x - part._x, self._y - part._y
        return rest

    def gram(self) -> np.ndarray:
        """X'X (groups, in, in)."""
        return self._gram - self._about(self._x, self._x)

    def cross(self) -> np.ndarray:
        """Y'X (groups, out, in)."""
        return self._cross - self._about(self._y, self._x)

    def mean(self) -> np.ndarray:
        """Return the mean of what is read (groups, in); 0 where no bias takes care of it."""
        return self._x / max(self.rows, 1) if self.layout.biased else np.zeros_like(self._x)

    def shift(self, weight: np.ndarray) -> np.ndarray:
        """Return what a bias lacks."""
        made = (weight @ self._x[:, :, None])[..., 0]
        shift: np.ndarray = (self._y - made).reshape(-1) / max(self.rows, 1)
        return shift

    def owed(self, weight: np.ndarray) -> np.ndarray:
        """Return (Y - X V')'X."""
        found: np.ndarray = self.cross() - weight @ self.gram()
        return found

    def lost(self, error: np.ndarray) -> float:
        """Return |X D'|^2."""
        return float(((error @ self.gram()) * error).sum())

    def metrics(self) -> list[Metric]:
        """Return the metric of each group."""
        return [metric.shrunk(gram, self.rows) for gram in self.gram()]

    def as_they_are(self) -> list[Metric]:
        """Return X'X of each group."""
        return list(self.gram())

    def _about(self, one: np.ndarray, other: np.ndarray) -> np.ndarray | float:
        return one[:, :, None] * other[:, None, :] / max(self.rows, 1) if self.layout.biased else 0.0


class FewMoments(Sums):
    """The rows themselves, in float32: of a layer that has fewer of them than inputs, or of which few are wanted."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._x: list[np.ndarray] = []
        self._y: list[np.ndarray] = []

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows (groups, rows, in) and (groups, rows, out)."""
        self.rows += x.shape[1]
        self.energy += float(np.vdot(y, y))
        self._x.append(x.astype(np.float32))
        self._y.append(y.astype(np.float32))

    def shift(self, weight: np.ndarray) -> np.ndarray:
        """Return what a bias lacks."""
        x, y = (np.concatenate(rows, axis=1).mean(axis=1, dtype=np.float64) for rows in (self._x, self._y))
        found: np.ndarray = (y - (weight @ x[:, :, None])[..., 0]).reshape(-1)
        return found

    def owed(self, weight: np.ndarray) -> np.ndarray:
        """Return (Y - X V')'X."""
        x = self._about(self._x)
        found: np.ndarray = (self._about(self._y) - x @ weight.swapaxes(1, 2)).swapaxes(1, 2) @ x
        return found

    def lost(self, error: np.ndarray) -> float:
        """Return |X D'|^2."""
        return float(np.square(self._about(self._x) @ error.swapaxes(1, 2)).sum())

    def metrics(self) -> list[Metric]:
        """Return the metric of each group."""
        return [metric.shrunk_rows(x) for x in self._about(self._x)]

    def as_they_are(self) -> list[Metric]:
        """Return X'X of each group."""
        return [metric.FewRows(x, 0.0) for x in self._about(self._x)]

    def _about(self, rows: list[np.ndarray]) -> np.ndarray:
        every = np.concatenate(rows, axis=1).astype(np.float64)
        return every - every.mean(axis=1, keepdims=True) if self.layout.biased else every


class Kept:
    """The rows themselves, in float32, of a layer whose targets shall be made anew from what comes out."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows: list[tuple[np.ndarray, ...]] = []

    def add(self, x: np.ndarray, target: np.ndarray, level: np.ndarray) -> None:
        """Keep rows: x (groups, rows, in); target, and what is added to it (groups, rows, out)."""
        self._rows.append(tuple(a.astype(np.float32) for a in (x, target, level)))

    def of_group(self, group: int) -> Rows:
        """Return the rows of one group."""
        x, target, level = (np.concatenate([a[group] for a in each]) for each in zip(*self._rows, strict=True))
        return Rows(x, target, level, self._layout.biased)
