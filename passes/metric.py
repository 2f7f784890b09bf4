"""What a linear layer reads, as the norm in which errors of its weight count. Pure numpy, float64.

Algebra. A layer reads rows of X (n, in), about their mean where a bias takes care of it. A weight (out, in) that errs
by D changes its output by

    |X D'|^2 = tr D X'X D'

The images are a sample. Of few rows the eigenvalues of X'X are too far apart: what lies beyond the n rows seems free.
So the sum is shrunk towards a multiple of the identity, by the part that is best for so many rows (OAS; Chen et al.
2010, "Shrinkage algorithms for MMSE covariance estimation"): with S = X'X / n, p inputs,

    H = n ((1 - s) S + s m I)        m = tr S / p
    s = ((1 - 2/p) tr S^2 + tr^2 S) / ((n + 1 - 2/p) (tr S^2 - tr^2 S / p)), at most 1

With next to no rows that is the weight's own norm; with many it is X'X.

Of inputs that are too many for H (25,088 of VGG's first Gemm: 5 GB), X itself is kept, of which there are fewer rows.
Then D H is made of two products, and H^-1 D' of one n x n system (Woodbury).
"""

from __future__ import annotations

import numpy as np

#: Part of the mean diagonal that H gets at least: channels that are always 0 have no inverse.
RIDGE = 1e-6


class FewRows:
    """H = X'X + `added` I for rows X (n, in), never made: what can be done with it are `D @ H` and `solved`."""

    __array_ufunc__ = None  # or numpy would take it for a number in D @ H

    def __init__(self, rows: np.ndarray, added: float) -> None:
        self.rows, self.added = rows, added

    def __len__(self) -> int:
        return int(self.rows.shape[1])

    def __rmatmul__(self, left: np.ndarray) -> np.ndarray:
        found: np.ndarray = (left @ self.rows.T) @ self.rows + self.added * left
        return found

    def solved(self, right: np.ndarray) -> np.ndarray:
        """Return H^-1 right, (in, any)."""
        inner = self.rows @ self.rows.T
        inner[np.diag_indices(len(inner))] += self.added
        found: np.ndarray = (right - self.rows.T @ np.linalg.solve(inner, self.rows @ right)) / self.added
        return found


Metric = np.ndarray | FewRows


def ridged(gram: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Return X'X with a ridge; the identity for a layer that reads nothing but zeros."""
    energy = float(np.trace(gram)) / len(gram)
    return np.eye(len(gram)) if energy <= 0 else gram + ridge * energy * np.eye(len(gram))


def shrunk(gram: np.ndarray, rows: int) -> np.ndarray:
    """Return H of X'X (in, in) over so many rows."""
    energy = float(np.trace(gram)) / len(gram)
    if energy <= 0:
        return np.eye(len(gram))
    part = shrinkage(energy * len(gram), float(np.vdot(gram, gram)), len(gram), rows)
    found: np.ndarray = (1 - part) * gram + (part + RIDGE) * energy * np.eye(len(gram))
    return found


def shrunk_rows(rows: np.ndarray) -> FewRows:
    """Return H of rows X (n, in), float64, that are fewer than their inputs."""
    inner = rows @ rows.T
    energy, (count, inputs) = float(np.trace(inner)), rows.shape
    part = shrinkage(energy, float(np.vdot(inner, inner)), inputs, count)
    if energy <= 0:
        return FewRows(np.zeros((1, inputs)), 1.0)
    return FewRows(np.sqrt(1 - part) * rows, (part + RIDGE) * energy / inputs)


def shrinkage(trace: float, square: float, inputs: int, rows: int) -> float:
    """Return s for tr X'X and tr (X'X)^2 over so many rows."""
    apart = square - trace**2 / inputs
    if apart <= 1e-12 * square or rows < 1:
        return 1.0
    return min(1.0, ((1 - 2 / inputs) * square + trace**2) / ((rows + 1 - 2 / inputs) * apart))


def pulled(metric: Metric, part: float) -> Metric:
    """Return H with a part of its mean diagonal added to it."""
    if isinstance(metric, FewRows):
        energy = float(np.vdot(metric.rows, metric.rows)) / len(metric) + metric.added
        return FewRows(metric.rows, metric.added + part * energy)
    return ridged(metric, part)


def solved(metric: Metric, right: np.ndarray) -> np.ndarray:
    """Return H^-1 right, (in, any)."""
    return metric.solved(right) if isinstance(metric, FewRows) else np.linalg.solve(metric, right)


def energy_of(weight: np.ndarray, metric: Metric) -> float:
    """Return tr W H W' of a weight (out, in…)."""
    flat = weight.reshape(len(weight), -1)
    return float(np.vdot(flat @ metric, flat))


def error_of(weight: np.ndarray, other: np.ndarray, metric: Metric) -> float:
    """Return tr (W - V) H (W - V)' over tr W H W'; 0 for a layer that gives nothing."""
    energy = energy_of(weight, metric)
    return energy_of(weight - other, metric) / energy if energy > 0 else 0.0
