"""Weights of a layer behind which a ReLU stands. Pure numpy.

A ReLU behind the sum forgives what is negative: where Y <= 0, any negative output is right. `forgiven` makes such
targets Y* of the present output Z, and refitting to them never raises the bound (majorisation; Zhang et al. 2015,
"Accelerating very deep convolutional networks")

    |relu(Y) - relu(Z)| <= |Y* - Z|        Y* = Y where Y > 0, else min(Z, 0)

Y is the whole sum in front of the ReLU, with what a residual Add brings, not only what the layer gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .pruning import refit

#: How often targets are made anew from what comes out: what a fourth time gains cannot be measured.
ROUNDS = 3
#: Rows that become float64 at a time.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Rows:
    """What a layer reads (n, in), what its weight shall make (n, out), and what is added to that in front of the ReLU.

    With `biased`, the layer's bias takes care of the mean.
    """

    x: np.ndarray
    target: np.ndarray
    level: np.ndarray
    biased: bool = True


def forgiven(target: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Return targets in front of a ReLU: those wanted where they are positive, else whatever negative was made."""
    found: np.ndarray = np.where(target > 0, target, np.minimum(made, 0))
    return found


def refit_forgiving(
    rows: Rows, gram: np.ndarray, kept: np.ndarray, ridge: float, weight: np.ndarray, rounds: int = ROUNDS
) -> np.ndarray:
    """Return weights (out, len(kept)) of the columns `kept` after so many rounds; of none, it is `pruning.refit`.

    `gram` (in, in) is X'X, about the mean of X where the rows are biased; `weight` (out, in) is the one it had.
    """
    x = rows.x - _mean(rows.x) if rows.biased else rows.x
    wanted = rows.target
    found = refit(gram, _product(wanted, x), kept, ridge, weight)
    for _ in range(rounds):
        made = x[:, kept] @ found.T.astype(x.dtype)
        if rows.biased:
            made += _mean(wanted)
        wanted = forgiven(rows.target + rows.level, made + rows.level) - rows.level
        found = refit(gram, _product(wanted, x), kept, ridge, weight)
    return found


def _mean(array: np.ndarray) -> np.ndarray:
    mean: np.ndarray = array.mean(axis=0, dtype=np.float64).astype(array.dtype)
    return mean


def _product(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return Y'X, summed in float64."""
    total = np.zeros((y.shape[1], x.shape[1]))
    for start in range(0, len(x), _ROWS):
        part = slice(start, start + _ROWS)
        total += y[part].T.astype(np.float64) @ x[part]
    return total
